"""A script is read as bash would run it: the same script, run by bash, says which words and values are right."""

import subprocess
from pathlib import Path

import pytest

from common.adopt.shell import Script, read_script

ROOT = Path(__file__).parents[3]
END = "\n---\n"
# Each ends in a command whose words bash prints; `show` stands for the training command.
SCRIPTS = [
    "A=1\nshow $A ${A} \"$A\" '$A' ${A}x",
    "A='a b'\nshow $A \"$A\" x$A ${A}y",
    'A="--x 1 \\\n  --y 2"\nshow $A',
    'A="a \\" \\$ \\\\ b"\nshow "$A"',
    "A=()\nB=(--x 1 'c d' # comment\n  --y)\nB+=(--z $EMPTY)\nEMPTY=\n"
    'show ${A[@]} "${B[@]}" ${B[@]} ${B[1]} ${#B[@]}',
    "show ${A:-5} ${B-6} ${C:-}${D:+7} ${E:=8} $E\nB=",
    "TP=4\nPP=2\nshow $(( TP * PP / 3 )) $((${TP}%3)) $(( (TP > 1) ? 1 : 0 )) $((-7/2)) $((2**5)) $((TP-PP-1))",
    "A=/x/y.tar.gz\nshow ${A##*/} ${A%.gz} ${A%%.*} ${A#/}",
    "A=7B\nif [ $A = 0.5B ]; then L=24\nelif [ $A = 7B ]; then L=28\nelse L=0\nfi\nshow $L",
    "A=7B\ncase $A in\n  0.5B | 1.5B) L=1 ;;\n  7*) L=2 ;;\n  *) L=3 ;;\nesac\nshow $L",
    'A=true\nB=2\nif [ "$A" = true ] && [ $B -gt 1 ]; then X=and; fi\n'
    '[ -z "$Y" ] && Y=empty\n[ -n "$Y" ] || Y=no\nshow $X $Y',
    "B=2\nif [[ $B == 2 && ( -z $Y || $Z != q ) ]]; then X=1; fi\n"
    "if [ $B -eq 2 -a $B -lt 3 ]; then Y=1; fi\nshow $X $Y",
    "B=2\nif (( B > 1 )); then X=1; else X=2; fi\nif ! [ $B = 3 ]; then Y=1; fi\nshow $X $Y",
    'f() { A=$1; show2=$2; }\nf x y\nshow $A $show2 $1 ${2} "$@"',
    "CMD=\"show --a 1\n --b '2 3'\"\neval ${CMD}",
    "A=1 # --x 2\nshow \\\n  --a $A \\\n  --b \\\n",
    "if true; then show yes; else show no; fi",
    "A=old\nA=${A}er\nA+=_more\nexport B=$A C\nshow $A $B",
    ": ${W:=9}\nshow $W",
]


def read(text: str, arguments: list[str] | None = None, **given: str) -> Script:
    return read_script(text, arguments, given)


def words(script: Script) -> list[str]:
    """The words of the first `show`, as they are shown."""
    command = next(command for command in script.commands if command.words[0] == "show")
    return [script.variables.shown(word) for word in command.words[1:]]


@pytest.mark.parametrize("text", SCRIPTS)
def test_words_are_those_of_bash(text: str) -> None:
    show = f"show() {{ printf '%s{END.strip()}' \"$@\"; exit; }}\n"
    done = subprocess.run(["bash", "-c", show + text, "script", "a b", "c"], capture_output=True, text=True, check=True)
    found = words(read(text, ["a b", "c"]))
    assert "".join(f"{word}{END.strip()}" for word in found) == done.stdout


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("show $(date +%Y)", "$(date +%Y)"),
        ("A=`nproc`\nshow x$A", "x`nproc`"),
        ("show ${RANK}", "${RANK}"),
        ("show $1", "$1"),
        ("show $(( RANK * 2 ))", "$(( RANK * 2 ))"),
        ("A=$RANK\nB=$A/x\nshow $B", "$RANK/x"),
        ("for i in 1 2; do A=$i; done\nshow $A", "$A"),
        ("if [ -f /etc/x ]; then A=1; else A=2; fi\nshow $A", "$A"),
        ("A=1\nif [ $RANK = 0 ]; then A=2; fi\nshow $A", "$A"),
        ("case $RANK in 0) A=1 ;; *) A=2 ;; esac\nshow $A", "$A"),
        ("A=1\n[ $RANK = 0 ] && A=2\nshow $A", "$A"),
        ("show ${A/x/y}", "${A/x/y}"),
        ("show $((1 / 0))", "$((1 / 0))"),
        ("show $HOME/x", "$HOME/x"),
    ],
)
def test_what_only_a_run_would_know_is_named_and_not_guessed(text: str, shown: str) -> None:
    assert words(read(text)) == [shown]


def test_nothing_of_a_script_is_executed(tmp_path: Path) -> None:
    file = tmp_path / "file"
    read(f"touch {file}\nA=$(touch {file})\nB=`touch {file}`\n: <(touch {file})\neval touch {file}\nshow $A $B")
    assert not file.exists()


def test_parts_that_are_not_read_are_listed_with_their_lines() -> None:
    script = read(
        "A=1\nif [ $A = 2 ]; then\n  B=1\nelse\n  C=1\nfi\n"
        "while true; do\n  D=1\ndone\nif [ $RANK = 0 ]; then E=1; fi\n"
    )
    assert script.skipped == [(3, "line 3: not taken: [ $A = 2 ]")]
    assert script.unread == [
        (7, "lines 7 to 9: a loop is not read: while true; do D=1 done"),
        (10, "line 10: whether [ $RANK = 0 ] holds is not known here"),
    ]


def test_a_script_ends_at_exit_and_a_here_document_is_no_command() -> None:
    script = read("show 1\n<<'E'\n--lr 1 if (\nE\necho 2\nexit 1\necho 3\n")
    assert [command.words for command in script.commands] == [("show", "1"), ("echo", "2"), ("exit", "1")]
    assert not script.unread


def test_arithmetic_is_kept_with_its_numbers() -> None:
    script = read("T=1000\nB=8\nI=$(( ${T} / $B / 4 ))\nJ=$(( RANK / 2 ))")
    assert script.variables.arithmetic == {"I": "${T} / $B / 4 = 1000 / 8 / 4 = 31"}


def test_variables_given_win_over_assignments_and_those_of_the_environment_are_noted() -> None:
    text = 'MODE=convert\nif [ -z "$VP" ]; then VP_SET=no; else VP_SET=yes; fi\nshow $MODE $VP_SET ${ROOT:-/x}'
    assert words(read(text)) == ["convert", "no", "/x"] and read(text).variables.unset == {"VP", "ROOT"}
    assert words(read(text, None, MODE="train", VP="2", ROOT="/y")) == ["train", "yes", "/y"]


def test_what_a_value_was_made_of_is_known() -> None:
    script = read("A=1\nB=$A\nC=($B x)\nD=2\nshow ${C[@]}")
    command = script.commands[0]
    assert script.variables.origins(command.read) == {"A", "B", "C"}


def test_broken_bash_is_named() -> None:
    script = read("A=1\nif [ $A = 1 ; then\nshow $A\n")
    assert script.unread and "no bash" in script.unread[0][1]
    assert "No closing quotation" in read('eval "show \'a"').unread[0][1]
