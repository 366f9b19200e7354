"""The parser that all commands share."""

from __future__ import annotations

import pytest

from modelscope_dolly.cli.parser import UsageParser
from modelscope_dolly.errors import SettingError


@pytest.fixture
def parser():
    parser = UsageParser(prog="some.program", description="Some program.")
    parser.add_argument("file")
    parser.add_argument("--number", type=int)
    return parser


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "required: file"),
        (["a", "--number"], "--number: expected one argument"),
        (["a", "--number", "x"], "invalid int value: 'x'"),
        (["a", "b"], "unknown argument 'b'"),
        (["a", "--nubmer", "1"], "unknown argument '--nubmer'. Did you mean '--number'? Allowed: --help, --number"),
    ],
)
def test_a_usage_error_is_a_setting_error_of_one_line(parser, arguments, says):
    with pytest.raises(SettingError) as caught:
        parser.parse_args(arguments)
    message = str(caught.value)
    assert says in message and message.endswith("; see some.program --help") and "\n" not in message


def test_what_is_right_is_parsed(parser):
    options = parser.parse_args(["a", "--number", "3"])
    assert (options.file, options.number) == ("a", 3)


def test_an_unknown_option_of_a_subcommand_is_compared_with_those_of_the_subcommand():
    parser = UsageParser(prog="p")
    commands = parser.add_subparsers(parser_class=UsageParser)
    commands.add_parser("one").add_argument("--colour")
    commands.add_parser("two").add_argument("--column")
    with pytest.raises(SettingError, match=r"'--columm'. Did you mean '--column'.*; see p two --help"):
        parser.parse_args(["two", "--columm", "3"])
