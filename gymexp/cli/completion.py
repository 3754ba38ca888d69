"""Tab completion of `python -m gymexp.X`. Hydra knows the choices, but its own shell function completes for
scripts and programs only."""

from __future__ import annotations

# For bash, and for zsh after `bashcompinit`. Hydra is asked as if the module were a program of that name.
_SHELL = r"""
_gymexp_complete() {
    COMPREPLY=()
    local line="${COMP_LINE:0:COMP_POINT}"
    local module="^([^ ]*python[0-9.]*) +-m +(gymexp\.[a-z]+) (.*)$"
    [[ "$line" =~ $module ]] || return
    local python="${BASH_REMATCH[1]}" name="${BASH_REMATCH[2]}" rest="${BASH_REMATCH[3]}"
    local asked="$name $rest" word="${rest##* }" choice
    local known="${word%=*}="
    [[ "$word" == *=* && "$COMP_WORDBREAKS" == *=* ]] || known=""
    local -x COMP_LINE="$asked" COMP_POINT=${#asked}
    for choice in $("$python" -m "$name" -sc query=bash 2>/dev/null); do
        COMPREPLY+=("${choice#"$known"}")
    done
}
complete -o nospace -o default -F _gymexp_complete python python3
"""


def asks_for_it(arguments: list[str]) -> bool:
    """Whether these are `-sc install=bash`, with which Hydra would print a function of its own."""
    return arguments in (["-sc", "install=bash"], ["--shell-completion", "install=bash"])


def script() -> str:
    return _SHELL.strip()
