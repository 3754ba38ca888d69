"""Sends the policy's adapter, not merged into its weights, from the trainer to vLLM (`model.lora.sync`).

An adapter is small, so it goes through files on every placement. vLLM loads it by /v1/load_lora_adapter,
under a name that says its version. It could also load a new version in place, under the old name; but then it
would read the file again at every step of its engine (0.31; https://github.com/vllm-project/vllm/pull/41482).
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from pathlib import Path

from gymexp.config.schema import LoraConfig
from gymexp.engine.adapter import name_of
from gymexp.engine.replicas import NamedTensors, Replicas, TensorSpecs
from gymexp.policy import lora


class AdapterTransfer:
    """Writes each version into a directory of its own, and keeps the last one for replicas that come back.

    directory: for the versions; the replicas must see it under the same path. A replica has one version at a
    time: the fence of an update keeps requests away while it has none.
    """

    sends_all = False

    def __init__(self, directory: Path, config: LoraConfig) -> None:
        self._directory = directory
        self._config = config
        self._known: defaultdict[str, set[int]] = defaultdict(set)  # versions that a replica may have, by url

    def send(self, replicas: Replicas, version: int, specs: TensorSpecs, weights: NamedTensors) -> None:
        """Sends the adapter's weights, which have the names of peft's files."""
        target = self._directory / str(version)
        lora.save_adapter(target, weights, self._config)
        self._load(replicas, version)
        for old in self._directory.iterdir():
            if old != target:
                shutil.rmtree(old)

    def again(self, replicas: Replicas, version: int) -> bool:
        self._load(replicas, version)
        return True

    def forget(self) -> None:
        pass

    def close(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)

    def _load(self, replicas: Replicas, version: int) -> None:
        """Makes the replicas load a version, and unload those that they may have, which may be the same one:
        a replica whose connection broke has not lost it, and vLLM refuses to load a name twice.
        """
        for old in sorted({known for url in replicas.urls for known in self._known[url]}):
            replicas.reach("/v1/unload_lora_adapter", {"lora_name": name_of(old)}, allowed=(404,))
        for url in replicas.urls:
            self._known[url].add(version)
        path = self._directory / str(version)
        replicas.reach("/v1/load_lora_adapter", {"lora_name": name_of(version), "lora_path": str(path)})
        for url in replicas.urls:
            self._known[url] = {version}
