"""Tab completion of gymexp's commands. Hydra knows the choices of an override, but its own shell function
completes for scripts and programs only."""

from __future__ import annotations

COMMANDS = ("train", "prepare", "status", "sweep", "doctor", "coldstart")
# For bash, and for zsh after `bashcompinit`. Hydra is asked as if the module were a program of that name.
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
        python="$(head -n 1 "$(command -v "${BASH_REMATCH[1]}")" | cut -c 3-)"
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
        doctor) words="--init --force" ;;
    esac
    if [[ "$name" == sweep || "$name" == status || "$word" == -* ]]; then
        COMPREPLY=($(compgen -W "$words" -- "$word"))
        return
    fi
    [[ "$name" == doctor ]] && name=train  # it takes a run's overrides
    local asked="gymexp.$name $rest" known="${word%=*}="
    [[ "$word" == *=* && "$COMP_WORDBREAKS" == *=* ]] || known=""
    local -x COMP_LINE="$asked" COMP_POINT=${#asked}
    for choice in $("$python" -m "gymexp.$name" -sc query=bash 2>/dev/null); do
        COMPREPLY+=("${choice#"$known"}")
    done
}
complete -o nospace -o default -F _gymexp_complete python python3 gymexp
"""


def asks_for_it(arguments: list[str]) -> bool:
    """Whether these are `-sc install=bash`, with which Hydra would print a function of its own."""
    return arguments in (["-sc", "install=bash"], ["--shell-completion", "install=bash"])


def script() -> str:
    """A function for the shell that completes commands, their flags, overrides, and directories."""
    return _SHELL.strip().replace("@COMMANDS@", " ".join(COMMANDS))
