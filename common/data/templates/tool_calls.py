"""Tools and their calls as chat templates take them, from OpenAI's rows and ShareGPT's: objects, or JSON in strings."""

import json
from math import inf
from typing import Any

from common.data.sources.jsonl import BadRowError
from common.data.templates.fields import is_nothing, numbers, without_nulls


def tools_of(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The tools of `row`, None without any; raises BadRowError unless each has a function's name."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        tools = load_json(tools, "field 'tools'")
    if is_nothing(tools):
        return None
    if isinstance(tools, list):
        tools = [load_json(tool, "a tool of field 'tools'") if isinstance(tool, str) else tool for tool in tools]
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRowError("field 'tools' holds no list of objects, each one tool")
    tools = [without_nulls(tool) for tool in tools]
    for number, tool in enumerate(tools, 1):
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not is_name(function.get("name")):
            raise BadRowError(f"field 'tools': tool {number} has no function with a name")
    check_numbers(tools, "field 'tools'")
    return tools


def calls_of(calls: Any, field: str = "field 'tool_calls'") -> list[dict[str, Any]]:
    """The calls as templates take them: `arguments` an object, where OpenAI's rows have its JSON.

    Raises BadRowError for what is no call of a function with a name and arguments.
    """
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadRowError(f"{field} holds no list of objects")
    return [_call_of(without_nulls(call), field) for call in calls]


def calls_of_text(value: Any) -> list[dict[str, Any]]:
    """The calls of a turn of ShareGPT's role function_call: JSON of one, or of a list; raises BadRowError."""
    field = "the turn of function_call"
    calls = load_json(value, field) if isinstance(value, str) else value
    calls = [calls] if isinstance(calls, dict) else calls
    if not calls:
        raise BadRowError(f"{field} holds no call")
    return calls_of(calls, field)


def _call_of(call: dict[str, Any], field: str) -> dict[str, Any]:
    function = call.get("function", call)
    if not isinstance(function, dict) or not is_name(function.get("name")):
        raise BadRowError(f"{field} holds a call without a function's name")
    what = f"the arguments of the call of {function['name'][:80]}"
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = load_json(arguments, what)
    if not isinstance(arguments, dict):
        raise BadRowError(f"{what} are no JSON object: write {{}} where there are none")
    check_numbers(arguments, what)
    function = {**without_nulls(function), "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def is_name(name: Any) -> bool:
    """Whether `name` can be a function's: a string of printable characters, not empty."""
    return isinstance(name, str) and bool(name) and name.isprintable()


def load_json(text: str, what: str) -> Any:
    """The value that the string `what` holds as JSON; raises BadRowError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise BadRowError(f"{what}: its JSON is nested too deeply") from None
    except ValueError as error:
        verb = "are" if what.startswith("the arguments") else "is a string that is"
        raise BadRowError(f"{what} {verb} no JSON ({error})") from None


def check_numbers(value: Any, what: str) -> None:
    """Raises BadRowError for a number that JSON has not, as NaN, which templates would write all the same."""
    for number in numbers(value):
        if not -inf < number < inf:
            raise BadRowError(f"{what}: a number is {number}, which is no JSON: write it as a string, or null")
