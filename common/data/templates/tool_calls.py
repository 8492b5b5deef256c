"""`tools` and `tool_calls` as chat templates take them, from OpenAI and ShareGPT rows: objects, or JSON strings."""

import json
from math import inf
from typing import Any

from common.data.sources.bad_rows import BadRowError
from common.data.templates.fields import is_empty, numbers, without_nulls


def parse_tools(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The tools of `row`, or None; raises BadRowError when one has no function name."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        tools = load_json(tools, "field 'tools'")
    if is_empty(tools):
        return None
    if isinstance(tools, list):
        tools = [load_json(tool, "a tool of field 'tools'") if isinstance(tool, str) else tool for tool in tools]
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRowError("field 'tools' is not a list of tool objects")
    tools = [without_nulls(tool) for tool in tools]
    for number, tool in enumerate(tools, 1):
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not is_name(function.get("name")):
            raise BadRowError(f"field 'tools': tool {number} has no function name")
    check_numbers(tools, "field 'tools'")
    return tools


def parse_tool_calls(calls: Any, field: str = "field 'tool_calls'") -> list[dict[str, Any]]:
    """The calls as chat templates take them: `arguments` is an object, which OpenAI's rows store as a JSON string.

    Raises BadRowError for a call without a function name or arguments.
    """
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadRowError(f"{field} is not a list of objects")
    return [_call_of(without_nulls(call), field) for call in calls]


def parse_function_call_turn(value: Any) -> list[dict[str, Any]]:
    """The calls of a ShareGPT function_call turn: JSON of one call, or of a list; raises BadRowError."""
    field = "the function_call turn"
    calls = load_json(value, field) if isinstance(value, str) else value
    calls = [calls] if isinstance(calls, dict) else calls
    if not calls:
        raise BadRowError(f"{field} holds no call")
    return parse_tool_calls(calls, field)


def _call_of(call: dict[str, Any], field: str) -> dict[str, Any]:
    function = call.get("function", call)
    if not isinstance(function, dict) or not is_name(function.get("name")):
        raise BadRowError(f"{field} holds a call without a function name")
    what = f"the arguments of the call to {function['name'][:80]}"
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = load_json(arguments, what)
    if not isinstance(arguments, dict):
        raise BadRowError(f"{what} are not a JSON object: write {{}} for none")
    check_numbers(arguments, what)
    function = {**without_nulls(function), "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def is_name(name: Any) -> bool:
    """Whether `name` is a valid function name: a non-empty, printable string."""
    return isinstance(name, str) and bool(name) and name.isprintable()


def load_json(text: str, what: str) -> Any:
    """The JSON value of `text`, which is called `what` in the error; raises BadRowError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise BadRowError(f"{what}: its JSON is nested too deeply") from None
    except ValueError as error:
        verb = "are" if what.startswith("the arguments") else "is a string that is"
        raise BadRowError(f"{what} {verb} not JSON ({error})") from None


def check_numbers(value: Any, what: str) -> None:
    """Raises BadRowError for NaN or infinity, which JSON does not have and templates would still write."""
    for number in numbers(value):
        if not -inf < number < inf:
            raise BadRowError(f"{what}: a number is {number}, which is not JSON: write it as a string, or null")
