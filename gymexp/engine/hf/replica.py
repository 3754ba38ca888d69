"""Runs the hf engine as a server of its own, for runs whose trainer is on another node, or samples and
trains at the same time:

    python -m gymexp.engine.hf.replica RUN_DIR/config.yaml --fd N

Besides the routes of `server.py` it has the routes of vLLM that `gymexp.engine.weight_sync` uses, so that the
trainer need not know which engine it is:

    POST /pause?mode=abort   POST /resume   POST /reset_prefix_cache
    POST /collective_rpc   {"method": "reload_weights", "kwargs": {"weights_path": DIRECTORY}}

Every path demands the key GYMEXP_ENGINE_KEY, which must be in the environment
(`gymexp.processes.access_keys`).
"""

from __future__ import annotations

import argparse
import asyncio
import logging
from pathlib import Path

import torch
from aiohttp import web
from safetensors import safe_open
from transformers import PreTrainedModel

from gymexp.config.load import from_yaml
from gymexp.engine.hf.engine import HFEngine
from gymexp.engine.hf.server import build_app
from gymexp.engine.replicas import VERSION_KEY
from gymexp.policy.hub_snapshot import directory_of
from gymexp.policy.model import end_token_ids, load_model, load_tokenizer
from gymexp.printable import log_to_stderr
from gymexp.processes import access_keys
from gymexp.processes.parent_watch import die_with_parent
from gymexp.processes.ports import adopt, url_of

log = logging.getLogger(__name__)


class Weights:
    """Routes that pause the engine and replace its weights."""

    def __init__(self, model: PreTrainedModel, engine: HFEngine) -> None:
        self._model = model
        self._engine = engine
        self._is_paused = False

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/pause", self._pause),
            web.post("/resume", self._resume),
            web.post("/reset_prefix_cache", self._reset_prefix_cache),
            web.post("/collective_rpc", self._collective_rpc),
        ]

    def load(self, directory: Path) -> None:
        """Loads the parameters in `model.safetensors`, and the version in its metadata.

        Raises ValueError if the file does not have exactly this model's parameters, OSError if it is
        unreadable.
        """
        parameters = dict(self._model.named_parameters())
        with safe_open(directory / "model.safetensors", "pt", device=str(self._model.device)) as file:
            if different := sorted(parameters.keys() ^ set(file.keys())):
                raise ValueError(f"{directory} and the model differ in {', '.join(different[:5])}")
            with torch.no_grad(), self._engine.paused():
                for name, parameter in parameters.items():
                    parameter.copy_(file.get_tensor(name))
                # With a new version the engine drops the keys and values of the old weights.
                self._engine.weights_version = int(file.metadata()[VERSION_KEY])

    async def _pause(self, request: web.Request) -> web.Response:
        if (mode := request.query.get("mode", "abort")) != "abort":
            raise web.HTTPBadRequest(text=f"the hf engine's only mode of a pause is abort, got {mode}")
        if not self._is_paused:
            self._is_paused = True
            self._pausing = asyncio.create_task(asyncio.to_thread(self._engine.pause))
        await asyncio.shield(self._pausing)
        await asyncio.to_thread(self._engine.cut)
        return web.json_response({})

    async def _resume(self, _: web.Request) -> web.Response:
        if self._is_paused:
            await asyncio.shield(self._pausing)
            self._is_paused = False
            self._engine.resume()
        return web.json_response({})

    async def _reset_prefix_cache(self, _: web.Request) -> web.Response:
        await asyncio.to_thread(self._engine.free_memory)
        return web.json_response({})

    async def _collective_rpc(self, request: web.Request) -> web.Response:
        match await request.json():
            case {"method": "reload_weights", "kwargs": {"weights_path": str(path)}}:
                try:
                    await asyncio.to_thread(self.load, Path(path))
                except (ValueError, OSError) as error:
                    raise web.HTTPBadRequest(text=str(error)) from None
                return web.json_response({})
            case other:
                raise web.HTTPBadRequest(text=f"the hf engine's only method is reload_weights, got {other}")


def main() -> None:
    die_with_parent()
    parser = argparse.ArgumentParser(prog="python -m gymexp.engine.hf.replica", allow_abbrev=False)
    parser.add_argument("config", type=Path, help="the run's config.yaml")
    parser.add_argument("--fd", type=int, required=True, help="a listening socket, handed down by the parent")
    args = parser.parse_args()
    log_to_stderr()
    key = access_keys.required(access_keys.ENGINE)
    config = from_yaml(args.config)
    dtype = getattr(torch, config.model.dtype)
    tokenizer = load_tokenizer(config.model)
    model = load_model(config.model)
    torch.nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu", dtype)
    engine = HFEngine(
        model,
        eos_token_ids=end_token_ids(tokenizer, directory_of(config.model)),
        pad_token_id=tokenizer.pad_token_id,  # pyright: ignore[reportArgumentType]
        max_batch_size=config.engine.max_batch_size,
        max_model_len=config.model.max_model_len,
        tokenizer=tokenizer,
        dtype=dtype,
    )
    app = build_app(engine)
    app.middlewares.insert(0, access_keys.guard(key))
    app.add_routes(Weights(model, engine).routes())
    sock = adopt(args.fd)
    log.info("the hf engine on %s", url_of(sock))
    web.run_app(
        app,
        sock=sock,
        handler_cancellation=True,
        access_log=None,
        shutdown_timeout=1.0,
        print=lambda *_: None,
    )
    engine.close()


if __name__ == "__main__":
    main()
