"""The model card of an exported policy: its metadata for the hub, and its text, both from the run's files."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import EvalResult, ModelCardData, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import ModelCard

from gymexp.config.schema import ModelConfig
from gymexp.export.card_facts import facts_of
from gymexp.export.chosen import Chosen
from gymexp.export.public_text import public_text
from gymexp.policy.hub_snapshot import resolve_path

_TEMPLATE = Path(__file__).parent / "card_template.md.jinja"


def base_id(model: ModelConfig) -> str | None:
    """Returns the base model's id on the hub; None if it is a directory."""
    return model.path if model.revision else None


def build_card(chosen: Chosen, name: str, adapter: bool, curves: bool, hosts: set[str], ask_hub: bool) -> str:
    """Returns the text of README.md.

    name: what a reader passes to from_pretrained. ask_hub: whether to ask the hub for the base model's
    license, if it is not cached; without an answer the card names none.
    """

    def in_code(value: object) -> str:
        """Returns a text of the run for a span of code, which it does not end, nor a table's cell."""
        return " ".join(public_text(str(value), hosts).replace("|", "/").replace("`", "'").split())

    facts = facts_of(chosen, hosts)
    base = base_id(chosen.config.model)
    data = _card_data(chosen, facts, name, adapter, _license_of(chosen.config.model, ask_hub))
    envs = [f"NeMo Gym's `{in_code(env)}`" for env in chosen.config.env]
    where = f"The model `{in_code(Path(chosen.config.model.path).name)}`"

    card = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        number=lambda value: "–" if value is None else f"{value:.3f}",
        p_value=lambda value: "< 0.001" if value < 0.001 else f"{value:.3f}",
        signed=lambda value: f"{value:+.3f}",
        code=in_code,
        text=lambda value: in_code(value).replace("<", "&lt;"),
        title=name.rpartition("/")[2],
        name=name,
        base=base or Path(chosen.config.model.path).name,
        revision=chosen.config.model.revision,
        base_words=f"[{base}](https://huggingface.co/{base})" if base else where,
        env_words=" and ".join(filter(None, (", ".join(envs[:-1]), envs[-1]))),
        adapter=adapter,
        curves=curves,
        **facts,
    )
    return re.sub(r"\n{3,}", "\n\n", str(card)).strip() + "\n"


def _card_data(
    chosen: Chosen, facts: dict[str, Any], name: str, adapter: bool, license_: dict[str, Any]
) -> ModelCardData:
    config = chosen.config
    base = base_id(config.model)
    hub_data = {n: e.data for n, e in config.env.items() if e.data.source == "huggingface"}
    results = [
        EvalResult(
            task_type="reinforcement-learning",
            dataset_type=str(hub_data[row["env"]].repo_id),
            dataset_name=row["env"],
            dataset_split="validation",
            dataset_revision=hub_data[row["env"]].revision,
            metric_type="reward",
            metric_name="mean reward of held-out tasks",
            metric_value=round(row["after"], 4),
        )
        for row in facts["table"]
        if row["env"] in hub_data and row["after"] is not None
    ]
    more: dict[str, Any] = {"base_model_relation": "adapter" if adapter else "finetune"} if base else {}
    if results:  # the hub's model-index: for data that the hub has; generated tasks are in the table alone
        more |= {"model_name": name.rpartition("/")[2], "eval_results": results}
    return ModelCardData(
        base_model=base,
        datasets=sorted({str(data.repo_id) for data in hub_data.values()}) or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["reinforcement-learning", "trl", str(facts["loss"]), "nemo-gym", "gymexp"],
        **license_,
        **more,
    )


def _license_of(model: ModelConfig, ask_hub: bool) -> dict[str, Any]:
    """Returns the license in the base model's own card, with its name and link if the card has them; empty
    if it is not known, as it is never guessed."""
    if base_id(model):
        cached = try_to_load_from_cache(model.path, "README.md", revision=model.revision)
        path = Path(cached) if isinstance(cached, str) else None
        if path is None and ask_hub:
            try:
                endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")
                found = hf_hub_download(
                    model.path, "README.md", revision=model.revision, endpoint=endpoint, etag_timeout=10
                )
            except (httpx.HTTPError, OSError, HFValidationError):
                return {}
            path = Path(found)
    else:
        path = Path(resolve_path(model.path)) / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path and path.is_file() else ""
    try:
        card = ModelCard(text, ignore_metadata_errors=True) if text.startswith("---") else None
    except ValueError:
        return {}
    data = card.data.to_dict() if card else {}
    return {name: data[name] for name in ("license", "license_name", "license_link") if data.get(name)}
