"""Two choices between "a" and "b", one after the other; 1 if the second is the other one.

Only a policy whose second turn is drawn anew can see both outcomes, and learn.
"""

from nemo_gym.openai_utils import NeMoGymResponse
from pydantic import Field
from resources_servers.gymnasium import GymnasiumServer, extract_text


class TwoTurns(GymnasiumServer):
    first: dict[str, str] = Field(default_factory=dict)

    async def reset(self, metadata: dict, session_id: str | None = None) -> tuple[str | None, dict]:
        return None, {}

    async def step(
        self, action: NeMoGymResponse, metadata: dict, session_id: str | None = None
    ) -> tuple[str | None, float, bool, bool, dict]:
        chosen = extract_text(action)
        if session_id not in self.first:
            self.first[session_id] = chosen
            return "And now?", 0.0, False, False, {}
        return None, float({chosen, self.first.pop(session_id)} == {"a", "b"}), True, False, {}


if __name__ == "__main__":
    TwoTurns.run_webserver()
