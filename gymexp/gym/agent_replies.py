"""What the code of NeMo Gym's agents says about their replies: whether these can have the policy's token ids.

NeMo Gym's model server puts the token ids on the messages of its answers. An agent that asks it through NeMo
Gym's client passes these messages on. An agent that starts a program, such as Claude Code or Codex, gives it
the model server's address and writes the messages anew from what the program prints, without token ids.

The code is read and not run, as by `config_classes`. Only what is certain counts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

_WRITES_MESSAGES = re.compile(r"\bNeMoGymResponseOutputMessage\(")
_ASKS_MODEL_SERVER = re.compile(r"\bserver_name\s*=\s*[\w.]*model_server\.name\b")
# But not `token_id_capture`: in NeMo Gym 0.7 the model server can keep them, which gymexp does not ask for.
_HAS_TOKEN_IDS = re.compile(r"token_ids?(?!_capture)|ForTraining\b")


def lack_token_ids(folder: str, roots: Sequence[Path]) -> bool:
    """Returns whether the replies of one of NeMo Gym's agents have no token ids, for certain.

    folder: of the agent, e.g. responses_api_agents/codex_agent. roots: the directories in which it is looked
    for; the last one is NeMo Gym's. False for an agent of the user's own, which is in another one.
    """
    found = next((root for root in roots if (root / folder).is_dir()), None)
    return found is not None and found == roots[-1] and _writes_all_anew(found / folder)


@cache
def _writes_all_anew(agent: Path) -> bool:
    files = (path for path in sorted(agent.rglob("*.py")) if "tests" not in path.relative_to(agent).parts)
    text = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in files)
    passes_on = _ASKS_MODEL_SERVER.search(text) or _HAS_TOKEN_IDS.search(text)
    return bool(_WRITES_MESSAGES.search(text)) and not passes_on
