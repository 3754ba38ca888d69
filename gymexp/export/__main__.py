"""Export a run: its policy as a Hugging Face folder with a model card, its rollouts as an Inspect log.

python -m gymexp.export outputs/<name>/<date_time> --to DIR                      the newest policy
python -m gymexp.export outputs/<name>/<date_time> --to DIR --checkpoint best    the best on held-out tasks
python -m gymexp.export outputs/<name>/<date_time> --to DIR --adapter            the LoRA adapter, not merged
python -m gymexp.export outputs/<name>/<date_time> --to DIR --push user/name     also to the hub; private
python -m gymexp.export outputs/<name>/<date_time> --inspect FILE.eval           rollouts for `inspect view`
python -m gymexp.export outputs/<name>/<date_time> --gym FILE.jsonl              rollouts in NeMo Gym's form
"""

from __future__ import annotations

import argparse
from pathlib import Path

from gymexp.cli.terminal import guarded, log_to_terminal, parser_of
from gymexp.config.schema import RunConfig
from gymexp.errors import GymexpError
from gymexp.printable import say


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("export", __doc__ or "")
    parser.add_argument("run", type=Path, metavar="RUN", help="the directory of a run")
    policy = parser.add_argument_group("the policy")
    policy.add_argument("--to", type=Path, metavar="DIR", help="write a Hugging Face folder")
    policy.add_argument(
        "--checkpoint", default="last", metavar="N|best|last", help="of this step; last if left out"
    )
    policy.add_argument("--adapter", action="store_true", help="the LoRA adapter alone, not merged")
    policy.add_argument("--push", metavar="USER/NAME", help="upload the folder; a new repository is private")
    policy.add_argument("--public", action="store_true", help="make the repository public")
    rollouts = parser.add_argument_group("the rollouts")
    rollouts.add_argument("--inspect", type=Path, metavar="FILE.eval", help="write a log of Inspect's")
    rollouts.add_argument("--gym", type=Path, metavar="FILE.jsonl", help="write NeMo Gym's own two files")
    of = rollouts.add_mutually_exclusive_group()
    of.add_argument("--eval", type=int, metavar="N", help="of the evaluation after step N; else the newest")
    of.add_argument("--steps", metavar="A:B", help="training rollouts of the steps A to B")
    rollouts.add_argument("--env", metavar="NAME", help="of this environment alone")
    rollouts.add_argument("--limit", type=int, metavar="N", help="at most N, spread over the selection")
    return parser


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends with a usage error if an argument would have no effect."""
    of_rollouts = args.inspect or args.gym
    if args.to is None and not of_rollouts:
        parser.error("say what to export: --to DIR (the policy), --inspect FILE.eval or --gym FILE.jsonl")
    if args.to is None and (args.push or args.adapter or args.checkpoint != "last"):
        parser.error("--push, --adapter and --checkpoint need --to DIR")
    if args.public and not args.push:
        parser.error("--public needs --push USER/NAME")
    if not of_rollouts and any(value is not None for value in (args.eval, args.steps, args.env, args.limit)):
        parser.error("--eval, --steps, --env and --limit need --inspect or --gym")
    if args.inspect is not None and args.inspect.suffix != ".eval":
        parser.error(f"--inspect must be a file that ends in .eval, got {args.inspect}")
    if args.gym is not None and args.gym.suffix != ".jsonl":
        parser.error(f"--gym must be a file that ends in .jsonl, got {args.gym}")


def _export_policy(run: Path, args: argparse.Namespace) -> None:
    from gymexp.export.chosen import choose
    from gymexp.export.folder import check_target, files_in, write_folder
    from gymexp.export.push import check_login, push

    chosen = choose(run, args.checkpoint)
    to = args.to.absolute()
    if to == run or run in to.parents:
        raise GymexpError(f"--to must be outside of the run directory, got {to}")
    check_target(chosen, to)
    if args.push:
        check_login()
    write_folder(chosen, to, args.adapter, args.push)
    files = files_in(to)
    for name, size in files.items():
        say(f"{size / 1e6:12.3f} MB  {name}")
    say(f"{sum(files.values()) / 1e6:12.3f} MB  step {chosen.step}, in {to}")
    if args.push:
        say(f"uploading to {args.push} ({'public' if args.public else 'private'})")
        say(f"pushed: {push(to, args.push, args.public)}")


def main() -> None:
    parser = _parser()
    args = parser.parse_args()
    _check(parser, args)
    log_to_terminal()
    run = args.run.resolve()
    if args.inspect is not None:
        from gymexp.export.inspect_log import write_log

        write_log(run, args)
    if args.gym is not None:
        from gymexp.export.gym_rollouts import write_gym_rollouts

        write_gym_rollouts(run, args)
    if args.to is not None:
        _export_policy(run, args)


if __name__ == "__main__":
    guarded(main, RunConfig)()
