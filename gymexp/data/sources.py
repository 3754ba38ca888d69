"""The sources of an environment's tasks: a generator, the Hugging Face hub, the data sets that NeMo Gym
names, or the user's own files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gymexp.config.schema import DataConfig, EnvConfig
from gymexp.data.cache import Say, sha256_of
from gymexp.data.generate import generate
from gymexp.data.nemo_gym import fetch_named, fill_prompts
from gymexp.errors import DataError


@dataclass(frozen=True)
class Files:
    """The files of an environment's rows. `demonstrations`: an expert's conversations for its train tasks, or
    None if the source has none."""

    train: Path
    validation: Path
    train_sha256: str
    validation_sha256: str
    demonstrations: Path | None = None


def fetch(name: str, env: EnvConfig, gym_python: Path | None, cache: Path, say: Say) -> Files:
    """Returns the environment's files, and makes or downloads them if necessary. With `validation_share` both
    are the file of the training tasks, of which a part is held out (`held_out.split`).

    gym_python: NeMo Gym's interpreter; `source=generate` and `source=nemo_gym` need it. Raises DataError
    that says why the files cannot be had, and what to set instead.
    """
    data = env.data
    if data.source == "generate":
        assert gym_python is not None, "source=generate needs NeMo Gym's Python"
        entry, hashes = generate(name, data, gym_python, cache, say)
        demonstrations = entry / "demonstrations.jsonl" if "demonstrations.jsonl" in hashes else None
        train, validation = entry / "train.jsonl", entry / "validation.jsonl"
        return Files(train, validation, hashes[train.name], hashes[validation.name], demonstrations)
    if data.source == "huggingface":
        # Imported only when needed, as it imports huggingface_hub and an HTTP client.
        from gymexp.data.hub import download

        train, validation = download(name, data, say)
        train, validation = _filled(name, data, (train, validation), gym_python, cache, say)
    elif data.source == "nemo_gym":
        assert gym_python is not None, "source=nemo_gym needs NeMo Gym's Python"
        train, validation = fetch_named(name, env, gym_python, cache, say)
    else:
        train = _own(f"env.{name}.data.train_file", data.train_file)
        validation = train
        if data.validation_share is None:
            validation = _own(f"env.{name}.data.validation_file", data.validation_file)
        train, validation = _filled(name, data, (train, validation), gym_python, cache, say)
    return Files(train, validation, sha256_of(train), sha256_of(validation))


def _filled(
    name: str, data: DataConfig, files: tuple[Path, Path], python: Path | None, cache: Path, say: Say
) -> tuple[Path, Path]:
    """Returns the files with the prompts of `data.prompt_config`, if that is set."""
    if data.prompt_config is None:
        return files
    assert python is not None, "data.prompt_config needs NeMo Gym's Python"
    filled = {
        path: fill_prompts(name, "rows", data.prompt_config, path, python, cache, say) for path in files
    }
    return filled[files[0]], filled[files[1]]


def _own(key: str, value: str | None) -> Path:
    assert value, key  # gymexp.config.rules has checked it
    path = Path(value).expanduser()
    if not path.is_file():
        rule = "is a directory" if path.is_dir() else "does not exist"
        where = "" if path.is_absolute() else f" (relative paths are seen from {Path.cwd()})"
        raise DataError(f"{key} must be a JSONL file, but {value} {rule}{where}")
    return path
