"""A run's folder as it grows: its curves, attempts, phases, events and state.

``refresh`` reads only what was appended since the last call, so that a page may ask every second.
"""

from __future__ import annotations

import math
import time
from array import array
from bisect import bisect_left
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Iterator, Optional

import orjson

from megatron_implicit.config import read_config_file
from megatron_implicit.errors import ConfigError

STALLED_S, STALLED_STEPS = 120.0, 10
"""A run is stalled when nothing came for this many seconds and for this many times its usual step."""
RECENT = 20
"""Steps that 'now' is averaged over."""
NAN = math.nan
REMEDY = "put the config.yaml of one of the run's checkpoints in its place"
"""For a run whose configuration is damaged."""


@dataclass(frozen=True)
class Attempt:
    """A job that went on with the run."""

    attempt: int
    step: int
    """The first step it made."""
    time: float
    gap_s: float
    """Seconds since the last step of the job before."""
    redone: int
    """Steps it made again, which that job had made after its last checkpoint."""


class LineReader:
    """The JSON objects appended to a file since the last call; lines that are no objects are left out."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset, self._rest = path, 0, b""

    def new(self) -> tuple[bool, Iterator[dict[str, Any]]]:
        """(whether the file began anew, its new objects)."""
        try:
            size = self._path.stat().st_size
        except OSError:
            return False, iter(())
        anew = size < self._offset
        if anew:
            self._offset, self._rest = 0, b""
        if size == self._offset:
            return anew, iter(())
        with open(self._path, "rb") as file:
            file.seek(self._offset)
            content = self._rest + file.read(size - self._offset)
        self._offset = size
        *lines, self._rest = content.split(b"\n")
        return anew, self._parsed(lines)

    @staticmethod
    def _parsed(lines: list[bytes]) -> Iterator[dict[str, Any]]:
        for line in lines:
            try:
                value = orjson.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                yield value


class RunHistory:
    """One run.

    Args:
        run_dir: a folder with a metrics.jsonl, now or later.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.events: list[dict[str, Any]] = []
        self.config: dict[str, Any] = {}
        """As the run's file has it; empty where there is none, or a damaged one."""
        self.damage: Optional[ConfigError] = None
        """What is wrong with that file; names it and the remedy."""
        self._metrics, self._event_lines = LineReader(run_dir / "metrics.jsonl"), LineReader(run_dir / "events.jsonl")
        self._config_time = 0.0
        self._clear()

    def _clear(self) -> None:
        self.steps = array("q")
        self._columns: dict[str, array[float]] = {}
        self._phases: list[str] = []
        self.attempts: list[Attempt] = []
        self.device_seconds = 0.0
        """Devices times the seconds between their steps, over all attempts."""
        self._last: Optional[dict[str, Any]] = None

    @property
    def name(self) -> str:
        """The run's, or its folder's."""
        return str((self.config.get("run") or {}).get("name") or self.run_dir.name)

    @property
    def last(self) -> dict[str, Any]:
        """The newest line; empty before the first."""
        return self._last or {}

    def refresh(self) -> None:
        """Reads what was appended."""
        self._refresh_config()
        self.events += filter(_is_event, self._event_lines.new()[1])
        anew, lines = self._metrics.new()
        if anew:
            self._clear()
        for line in lines:
            if _is_step(line):
                self._take(line)

    def column(self, key: str) -> array[float]:
        """The values of a key by row, NaN where a step has none."""
        return self._columns.get(key) or array("d", [NAN]) * len(self.steps)

    @property
    def keys(self) -> list[str]:
        """What steps have numbers of."""
        return list(self._columns)

    def recent(self, key: str) -> Optional[float]:
        """The mean over the last steps that have the key."""
        values = [value for value in self.column(key)[-RECENT:] if not math.isnan(value)]
        return sum(values) / len(values) if values else None

    def phases(self) -> list[dict[str, Any]]:
        """Stretches of steps of the same phase: name, first and last step."""
        spans: list[dict[str, Any]] = []
        for step, phase in zip(self.steps, self._phases):
            if spans and spans[-1]["name"] == phase:
                spans[-1]["last"] = step
            elif step > 0:
                spans.append({"name": phase, "first": step, "last": step})
        return spans

    def curves(self, keys: list[str], points: int, first: int = 0, last: int = 2**62) -> dict[str, list[Any]]:
        """Columns for drawing: ``step``, ``time`` and the keys, at most about ``points`` rows.

        Rows are put together by equal numbers: their mean counts, of a ``_max`` the largest, of ``time`` the last.
        """
        low, high = bisect_left(self.steps, first), bisect_left(self.steps, last + 1)
        width = max(1, math.ceil((high - low) / points))
        starts = range(low, high, width)
        result: dict[str, list[Any]] = {"step": [self.steps[min(i + width, high) - 1] for i in starts]}
        for key in ("time", *keys):
            column = self.column(key)
            if width == 1:
                result[key] = [_json(value) for value in column[low:high]]
            else:
                merge = _largest if key.endswith("_max") else _last if key == "time" else _mean
                result[key] = [merge(column[i : min(i + width, high)]) for i in starts]
        return result

    def state(self, now: Optional[float] = None) -> str:
        """'running', 'stalled', 'finished', 'stopped', 'failed', 'waiting' (nothing of it yet) or 'unreadable'."""
        if self.damage:
            return "unreadable"
        now = time.time() if now is None else now
        last_time = self.last.get("time", 0.0)
        for event in reversed(self.events):
            if event.get("kind") in ENDS and event.get("time", 0) >= last_time - 1:
                return ENDS[event["kind"]]
            if event.get("kind") in ("start", "resume", "branch"):
                last_time = max(last_time, event.get("time", 0))
                break
        if not self.last and not self.events:
            return "waiting"
        usual = self.recent("step_time_s") or 0.0
        return "stalled" if now - last_time > max(STALLED_S, STALLED_STEPS * usual) else "running"

    def summary(self) -> dict[str, Any]:
        """One line about the run, for tables."""
        last, train = self.last, self.config.get("train") or {}
        steps, step = train.get("steps") or last.get("step") or 0, last.get("step", 0)
        state = self.state()
        return {
            "name": self.name,
            "dir": str(self.run_dir),
            "state": state,
            "reason": str(self.damage) if self.damage else None,
            "family": (self.config.get("model") or {}).get("family", ""),
            "size": (self.config.get("model") or {}).get("size", ""),
            "phase": last.get("phase"),
            "step": step,
            "steps": steps,
            "eta_s": self._remaining_s(steps - step) if state == "running" else None,
            "device_hours": self.device_seconds / 3600,
            "ranks": last.get("ranks"),
            "attempt": last.get("attempt", 0),
            "time": last.get("time"),
            "tokens": last.get("tokens"),
            **{key: _json(self.recent(key)) for key in _SHOWN},
            "validation_loss": next((v for v in reversed(self.column("validation_loss")) if not math.isnan(v)), None),
        }

    def described(self) -> dict[str, Any]:
        """What a run's page shows beside the curves."""
        return {
            **self.summary(),
            "phases": self.phases(),
            "attempts": [asdict(attempt) for attempt in self.attempts],
            "events": self.events[-500:],
        }

    # ---------------------------------------------------------------- reading

    def _refresh_config(self) -> None:
        path = self.run_dir / "config.yaml"
        try:
            changed = path.stat().st_mtime
        except OSError:  # none yet, or its folder has gone
            self.damage = None
            return
        if changed == self._config_time:
            return
        try:
            self.config, self.damage, self._config_time = _read_config(path), None, changed
        except ConfigError as error:
            self.config, self.damage, self._config_time = {}, error, 0.0

    def _take(self, line: dict[str, Any]) -> None:
        self._take_attempt(line)
        step = line["step"]
        row = len(self.steps) if not self.steps or step > self.steps[-1] else bisect_left(self.steps, step)
        if row == len(self.steps) or self.steps[row] != step:
            self.steps.insert(row, step)
            self._phases.insert(row, "")
            for column in self._columns.values():
                column.insert(row, NAN)
        else:  # made again: nothing of the earlier attempt stays
            for column in self._columns.values():
                column[row] = NAN
        self._phases[row] = line.get("phase") or "main"
        for key, value in line.items():
            if isinstance(value, (int, float)) and key != "step":
                if key not in self._columns:
                    self._columns[key] = array("d", [NAN]) * len(self.steps)
                self._columns[key][row] = value
        self._last = line

    def _take_attempt(self, line: dict[str, Any]) -> None:
        before, attempt = self._last, line.get("attempt", 0)
        if before is None:
            return
        passed = line["time"] - before["time"]
        if attempt == before.get("attempt", 0):
            if before["step"] > 0 and passed > 0:
                self.device_seconds += passed * (line.get("ranks") or 1)
            return
        redone = max(0, before["step"] - line["step"] + 1)
        self.attempts.append(Attempt(attempt, line["step"], line["time"], max(0.0, passed), redone))

    def _remaining_s(self, steps: int) -> Optional[float]:
        """At most: phases to come are counted with all the evaluations they may take."""
        times = self.column("time")[-RECENT - 1 :]
        if len(times) < 3 or steps <= 0:
            return 0.0 if steps <= 0 and times else None
        per_step = (times[-1] - times[0]) / (len(times) - 1)
        return per_step * steps * self._cost_to_come()

    def _cost_to_come(self) -> float:
        """Mean passes of a step still to be made, by those of the last one."""
        phases, solver = self.config.get("curriculum") or [], self.config.get("solver") or {}
        evaluations = self.recent("evaluations_mean")
        done = self.last.get("step", 0) / ((self.config.get("train") or {}).get("steps") or 1)
        if evaluations is None or len(phases) < 2 or done >= 1:
            return 1.0
        ends = [phase.get("start") or 0.0 for phase in phases[1:]] + [1.0]
        now = next((phase for phase, end in zip(phases, ends) if done < end), phases[-1])

        def passes(phase: dict[str, Any]) -> float:
            most = _or(phase.get("max_iterations"), solver.get("max_iterations", 1))
            made = evaluations if phase is now else most
            return made + 3 * _or(phase.get("phantom_steps"), solver.get("phantom_steps", 1))

        ahead = [(phase, end - max(done, phase.get("start") or 0.0)) for phase, end in zip(phases, ends) if end > done]
        return sum(passes(phase) * share for phase, share in ahead) / (1 - done) / passes(now)


ENDS = {"finish": "finished", "stop": "stopped", "error": "failed"}
"""Kinds of events that end a job, and the state they leave a run in."""
_SHOWN = (
    "loss", "grad_norm", "learning_rate", "tokens_per_s", "model_flops_per_s", "mfu", "step_time_s", "evaluations_mean",
    "evaluations_p99", "residual_mean", "unconverged_fraction", "memory_bytes",
)  # fmt: skip


_NUMBERS = ("start", "steps", "max_iterations", "phantom_steps")
"""Keys of a configuration that are calculated with here."""


def _read_config(path: Path) -> dict[str, Any]:
    config = read_config_file(path, REMEDY)
    for section in (config.get("train", {}), config.get("solver", {}), *config.get("curriculum", [])):
        for key in _NUMBERS:
            if not isinstance(section.get(key), (int, float, type(None))):
                raise ConfigError(f"{path} cannot be read ({key}={section[key]} is no number): {REMEDY}")
    return config


def _is_step(line: dict[str, Any]) -> bool:
    counts = (line.get("attempt"), line.get("ranks"))
    return (
        isinstance(line.get("step"), int)
        and isinstance(line.get("time"), float)
        and all(isinstance(value, (int, type(None))) for value in counts)
    )


def _is_event(line: dict[str, Any]) -> bool:
    kinds = {"time": (int, float), "step": int, "kind": str, "message": str}
    return all(isinstance(line.get(key), kind) for key, kind in kinds.items())


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _json(value: Optional[float]) -> Optional[float]:
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.6g}") if abs(value) < 1e9 else value


def _mean(values: "array[float]") -> Optional[float]:
    known = [value for value in values if not math.isnan(value)]
    return _json(sum(known) / len(known)) if known else None


def _largest(values: "array[float]") -> Optional[float]:
    return _json(max((value for value in values if not math.isnan(value)), default=NAN))


def _last(values: "array[float]") -> Optional[float]:
    return _json(values[-1])
