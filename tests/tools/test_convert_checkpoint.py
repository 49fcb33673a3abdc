"""The command: what it prints, what it leaves, how it fails."""

from __future__ import annotations

import json

from tests.conversion.folders import write_reference


def test_it_converts_verifies_and_reports(work) -> None:
    write_reference(work.folder / "reference", "implicit_mamba2")
    done = work.run(
        "convert_checkpoint", "--from", "reference", "--to", "hf", "--input", "reference", "--output", "hf",
        "--verify", "--report", "report.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "not mapped: criterion.decoder.weight (repeats the embedding)" in done.stdout
    assert "implicit_mamba2: 42 tensors, 113,872 parameters, 1 not mapped: reference -> hf" in done.stdout
    assert "tokenizer: none of this model in reference: copy it to hf\n" in done.stdout
    line = done.stdout.splitlines()[-1]
    assert line.startswith("verify: megatron_implicit against transformers on 64 tokens: largest logit difference")
    assert float(line.split()[-1]) <= 1e-5
    report = json.loads((work.folder / "report.json").read_text())
    assert {"name", "key", "shape", "dtype", "error"} == set(report["mapped"][0])
    work.fails(
        "--output hf exists", "convert_checkpoint", "--from", "reference", "--to", "megatron", "--input", "reference",
        "--output", "hf", code=2,
    )  # fmt: skip
    work.fails(
        "reference is not in the format hf: it looks like reference", "convert_checkpoint", "--from", "hf", "--to",
        "megatron", "--input", "reference", "--output", "new",
    )  # fmt: skip
