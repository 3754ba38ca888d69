"""The exported folder: a plain model or an adapter, its card, and the records of its run.

    model.safetensors config.json generation_config.json tokenizer…      or adapter_model.safetensors …
    README.md                                                            the model card
    gymexp/config.yaml overrides.yaml versions.txt metrics.csv result.json curves.svg export.json

The folder gets its name when it is whole, so an interrupted export leaves none.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import orjson

from gymexp.errors import GymexpError
from gymexp.export.card import base_id, build_card
from gymexp.export.chosen import Chosen
from gymexp.export.curves import draw_curves
from gymexp.export.public_text import hosts_of, public_text
from gymexp.files import read_json, read_lines
from gymexp.policy.checkpoint_model import materialize, write_adapter, written_aside
from gymexp.policy.hub_snapshot import files_of
from gymexp.printable import csv_cell

MARK = "gymexp/export.json"
_TEXTS = ("config.yaml", "overrides.yaml", "versions.txt", "result.json")
_NOT_THE_MODELS = ("trainer_state.json", "complete.json")  # JSON files of a checkpoint


def identity_of(run: Path) -> str:
    """Returns what tells a run from every other, also after it was moved: the time of its first start."""
    first = next(iter(read_lines(run / "timeline.jsonl")), {})
    return str(first.get("time", run.name))


def check_target(chosen: Chosen, to: Path) -> None:
    """Raises GymexpError if the folder has something else than an earlier export of the same run."""
    if not to.exists() or (to.is_dir() and not any(to.iterdir())):
        return
    mark = read_json(to / MARK)
    if mark.get("run") != identity_of(chosen.run):
        what = "an export of another run" if mark else "other files"
        raise GymexpError(
            f"--to must be a new or an empty folder, or an earlier export of {chosen.run}, but {to} has "
            f"{what}"
        )


def write_folder(chosen: Chosen, to: Path, adapter: bool, name: str | None) -> None:
    """Writes the folder, in place of an earlier export of the same run.

    name: the repository on the hub that it will be pushed to, or None. Raises GymexpError if the folder has
    other files, or if the policy cannot be exported.
    """
    check_target(chosen, to)
    fresh = to.with_name(f".{to.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)  # of an export that was killed
    with written_aside(fresh) as part:
        if adapter:
            write_adapter(chosen.run, chosen.path, part)
            _name_base(chosen, part)
        else:
            _write_model(chosen, part)
        _write_records(chosen, part, adapter, name or to.name, ask_hub=name is not None)
    old = to.with_name(f".{to.name}.old")
    if to.exists():
        shutil.rmtree(old, ignore_errors=True)
        to.rename(old)
    fresh.rename(to)
    shutil.rmtree(old, ignore_errors=True)


def files_in(folder: Path) -> dict[str, int]:
    """Returns the bytes of each file of a folder, by its relative path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_size for path in paths}


def _write_model(chosen: Chosen, part: Path) -> None:
    made = part / ".model"
    source = materialize(chosen.run, chosen.path, made)
    names = [p.name for p in source.iterdir() if p.is_file() and p.name not in _NOT_THE_MODELS]
    copy = shutil.move if source == made else shutil.copyfile
    for name in files_of(names, lambda n: (source / n).read_text()):
        copy(source / name, part / name)
    shutil.rmtree(made, ignore_errors=True)
    # A checkpoint has the settings of a model in training.
    _change_json(part / "config.json", use_cache=True)
    trainer = chosen.config.trainer
    sampling = {"temperature": trainer.get("temperature", 1.0), "top_p": trainer.get("top_p", 1.0)}
    sampling |= {"top_k": trainer.get("top_k") or 0, "do_sample": True}
    if trainer.get("min_p"):
        sampling["min_p"] = trainer["min_p"]
    _change_json(part / "generation_config.json", **sampling)


def _change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(read_json(path) | values, indent=2) + "\n")


def _name_base(chosen: Chosen, part: Path) -> None:
    """Names the base model of an adapter as a reader on another machine finds it."""
    model = chosen.config.model
    name = base_id(model) or Path(model.path).name
    _change_json(part / "adapter_config.json", base_model_name_or_path=name, revision=model.revision)


def _write_records(chosen: Chosen, part: Path, adapter: bool, name: str, ask_hub: bool) -> None:
    """Writes the card, and the run's records below gymexp/."""
    run, hosts = chosen.run, hosts_of(chosen.run)
    records = part / "gymexp"
    records.mkdir()
    for file in _TEXTS:
        if (run / file).is_file():
            text = (run / file).read_text(encoding="utf-8", errors="replace")
            (records / file).write_text(public_text(text, hosts), encoding="utf-8")
    metrics = read_lines(run / "metrics.jsonl")
    (records / "metrics.csv").write_text(_csv_of(metrics), encoding="utf-8")
    curves = draw_curves(metrics, list(chosen.config.env), records / "curves.svg")
    form = "adapter" if adapter else "model"
    mark = {"run": identity_of(run), "step": chosen.step, "form": form}
    (part / MARK).write_text(json.dumps(mark, indent=1) + "\n")
    card = build_card(chosen, name, adapter, curves, hosts, ask_hub)
    (part / "README.md").write_text(card, encoding="utf-8")


def _csv_of(entries: list[dict[str, Any]]) -> str:
    """Returns the metrics as CSV, a line an entry. A text is quoted so that no spreadsheet computes it."""
    columns = list(dict.fromkeys(name for entry in entries for name in entry))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(map(_cell, columns))
    writer.writerows([_cell(entry.get(name)) for name in columns] for entry in entries)
    return out.getvalue()


def _cell(value: Any) -> Any:
    if value is None or isinstance(value, int | float):
        return value
    return csv_cell(value if isinstance(value, str) else orjson.dumps(value).decode())
