"""Tools for chat: `calculate`, `solve` and `search`, the three of MOSS's plugins and of XTuner's `--with-plugins`.

None of them executes what the model writes. What they need is imported when they are used: every command imports this.
https://github.com/OpenLMLab/MOSS.
"""

from mmft import hookimpl
from mmft.specs import Tool


def calculate(expression: str) -> str:
    """The value of an expression. Raises `DataError` where it has none."""
    from mmft_plugins._arithmetic import calculated

    return calculated(expression)


def solve(equations: str) -> str:
    """The solutions of equations. Raises `DataError` where they cannot be read or take too long."""
    from mmft_plugins._equations import solved

    return solved(equations)


def nothing_to_solve_with() -> str | None:
    """Why nothing can be solved here."""
    from mmft_plugins._equations import missing

    return missing()


def search(query: str) -> str:
    """The first hits of a web search. Raises `DataError` where there is no answer."""
    from mmft_plugins._search import searched

    return searched(query)


def nowhere_to_search() -> str | None:
    """Why nothing can be searched for here."""
    from mmft_plugins._search import missing

    return missing()


def _takes(name: str, description: str) -> dict[str, object]:
    """The schema of one required string."""
    properties = {name: {"type": "string", "description": description}}
    return {"type": "object", "properties": properties, "required": [name]}


CALCULATE = Tool(
    name="calculate",
    description="Calculate the value of an arithmetic expression.",
    parameters=_takes(
        "expression",
        "such as 12 * (3 + 4) or sqrt(2) ^ 2; + - * / // % ^, brackets, pi, e, sqrt, sin, cos, tan (radians), "
        "exp, ln, log (natural, or log(x, base)), abs, round, min, max and factorial",
    ),
    run=calculate,
    summary="arithmetic, by a parser of its own",
)
SOLVE = Tool(
    name="solve",
    description="Solve an equation, or several together, for their unknowns.",
    parameters=_takes("equations", "such as x^2 - 5x + 6 = 0, or several with commas: x + y = 3, x - y = 1"),
    run=solve,
    unavailable=nothing_to_solve_with,
    summary="equations, by sympy in a process with a time limit",
)
SEARCH = Tool(
    name="search",
    description="Search the web and get the first results with their addresses.",
    parameters=_takes("query", "what to search for"),
    run=search,
    unavailable=nowhere_to_search,
    summary="the web, by Serper with SERPER_API_KEY or by the endpoint in MMFT_SEARCH_URL",
)


@hookimpl
def mmft_tools() -> list[Tool]:
    """The three of them."""
    return [CALCULATE, SOLVE, SEARCH]
