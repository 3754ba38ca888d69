"""Tab completion of gymexp's commands in a shell.

Hydra knows the choices of an override, but its own shell function completes only scripts and programs, not
`python -m gymexp.…`.
"""

from __future__ import annotations

COMMANDS = (
    "train",
    "evaluate",
    "prepare",
    "envs",
    "status",
    "view",
    "report",
    "rollouts",
    "export",
    "sweep",
    "doctor",
    "coldstart",
)
# For bash, and for zsh after `bashcompinit`. The query to Hydra names the module as if it were a program.
_SHELL = r"""
_gymexp_complete() {
    COMPREPLY=()
    local line="${COMP_LINE:0:COMP_POINT}" word="${COMP_LINE:0:COMP_POINT}" python name rest choice words=""
    word="${word##* }"
    local module="^([^ ]*python[0-9.]*) +-m +gymexp\.([a-z]+) (.*)$" command="^([^ ]*gymexp) +([a-z]+) (.*)$"
    local first="^[^ ]*gymexp +[a-z]*$"
    if [[ "$line" =~ $module ]]; then
        python="${BASH_REMATCH[1]}" name="${BASH_REMATCH[2]}" rest="${BASH_REMATCH[3]}"
    elif [[ "$line" =~ $command ]]; then
        name="${BASH_REMATCH[2]}" rest="${BASH_REMATCH[3]}"
        local program="$(command -v "${BASH_REMATCH[1]}")"
        python="$(head -n 1 "$program" | cut -c 3-)"
        # pip starts Python through sh if its path has a space.
        [[ "$python" == */sh ]] && python="$(dirname "$program")/python"
        [[ -x "$python" ]] || python=python
    elif [[ "$line" =~ $first ]]; then
        COMPREPLY=($(compgen -W "@COMMANDS@" -- "$word"))
        return
    else
        return
    fi
    case "$name" in
        sweep) [[ "$rest" == *" "* ]] || words="status collect resubmit" ;;
        status) words="--follow" ;;
        view) words="--port --host --tokenizer --export --steps --env --limit" ;;
        rollouts) words="--step --eval --env --worst --best --number --full" ;;
        export) words="--to --checkpoint --adapter --push --public --inspect --eval --steps --env --limit" ;;
        doctor) words="--init --force" ;;
        envs)
            words="show --search --json gym.version= gym.python="
            if [[ "$rest" == "show "* ]]; then
                words="$(COMP_LINE="gymexp.t env=" COMP_POINT=13 "$python" -m gymexp.train -sc query=bash)"
                words="${words//env=/}"
            fi ;;
    esac
    if [[ "$name" =~ ^(sweep|status|view|report|rollouts|export|envs)$ || "$word" == -* ]]; then
        COMPREPLY=($(compgen -W "$words" -- "$word"))
        return
    fi
    [[ "$name" == doctor ]] && name=train  # doctor takes a run's overrides
    local query="gymexp.$name $rest" known="${word%=*}="
    [[ "$word" == *=* && "$COMP_WORDBREAKS" == *=* ]] || known=""
    local -x COMP_LINE="$query" COMP_POINT=${#query}
    for choice in $("$python" -m "gymexp.$name" -sc query=bash 2>/dev/null); do
        COMPREPLY+=("${choice#"$known"}")
    done
}
complete -o nospace -o default -F _gymexp_complete python python3 gymexp
"""


def is_install_request(arguments: list[str]) -> bool:
    """Returns whether the arguments are `-sc install=bash`, for which Hydra would print its own function."""
    return arguments in (["-sc", "install=bash"], ["--shell-completion", "install=bash"])


def script() -> str:
    """Returns the shell function that completes commands, their flags, overrides, and directories."""
    return _SHELL.strip().replace("@COMMANDS@", " ".join(COMMANDS))
