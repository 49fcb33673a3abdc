"""open_datasets on two real processes: one cache, the same samples, and an error of one rank on both."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.multiprocessing

from megatron_implicit.config.schema import DataConfig
from megatron_implicit.data.tokenizers import Tokenizer, load_tokenizer, train_sentencepiece
from megatron_implicit.errors import DataError


def work(rank: int, folder: str, result: str) -> None:
    from megatron_implicit.data.datasets import open_datasets

    dist.init_process_group(
        "gloo", init_method=f"file://{result}/rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    tokenizer = load_tokenizer(f"{folder}/tokenizer.model")
    mine = tokenizer if rank == 0 else load_tokenizer(f"{folder}/other.model")

    def first_tokens(used: Tokenizer, **fields: Any) -> str:
        data = DataConfig(path=folder, **{"sequence_length": 64} | fields)
        train = open_datasets(data, used, train_samples=40, validation_samples=0, test_samples=0, seed=1).train
        return str([int(train[i]["tokens"][0]) for i in range(40)])

    lines = [first_tokens(tokenizer)]
    for used, fields in (
        (mine, {}),
        (tokenizer, {"cache_dir": f"{result}/cache{rank}"}),
        (tokenizer, {"sequence_length": 10**7}),
    ):
        try:
            lines.append(first_tokens(used, **fields))
        except DataError as error:
            lines.append(str(error))
    Path(f"{result}/rank{rank}").write_text("\n".join(lines))
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_share_one_cache_and_fail_together(
    folder: Path, texts: list[str], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    train_sentencepiece(texts, folder / "tokenizer.model", 2048)
    train_sentencepiece(texts[:300], folder / "other.model", 600)
    torch.multiprocessing.spawn(work, (str(folder), str(tmp_path)), nprocs=2)
    zero, one = ((tmp_path / f"rank{rank}").read_text().split("\n") for rank in (0, 1))
    assert len(zero) == len(one) == 4
    assert zero[0] == one[0] and zero[0].count(",") == 39
    assert len(list((folder / "cache").glob("samples-*.json"))) == 2
    assert "another tokenizer" in one[1] and zero[1] == one[1] + " (rank 1)"
    assert "data.cache_dir" in one[2] and zero[2] == one[2] + " (rank 1)"
    assert "too few" in zero[3] and one[3] == zero[3] + " (rank 0)"
