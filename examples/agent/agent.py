"""An agent: the openai client, two tools, and a loop, against lococo-serve on this machine."""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import operator
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam

SYSTEM = """You answer questions with tools. Each of your messages is one JSON object.
{"tool": "calculator", "input": ...} computes. {"tool": "search", "input": ...} finds the lines of files that contain a
word. {"tool": "answer", "input": ...} answers with what the tools said."""

EXAMPLE: list[ChatCompletionMessageParam] = [
    {"role": "user", "content": "What is 12 times 7?"},
    {"role": "assistant", "content": '{"tool": "calculator", "input": "12 * 7"}'},
    {"role": "user", "content": "calculator: 84"},
    {"role": "assistant", "content": '{"tool": "answer", "input": "12 times 7 is 84."}'},
    {"role": "user", "content": "What does a yellow flag mean?"},
    {"role": "assistant", "content": '{"tool": "search", "input": "yellow"}'},
    {"role": "user", "content": "search: Flags. White: start. Yellow: danger on the track. Black: stop."},
    {"role": "assistant", "content": '{"tool": "answer", "input": "A yellow flag means danger on the track."}'},
]

INPUTS = {"calculator": r"[0-9][0-9+*/(). -]{0,40}", "search": r"[a-z]{1,20}", "answer": r"[^\n]{1,200}"}


def action_schema(*tools: str) -> dict[str, object]:
    """What a message of the model must be. It is enforced token by token, so nothing else ever comes."""
    return {
        "anyOf": [
            {
                "type": "object",
                "properties": {"tool": {"const": tool}, "input": {"type": "string", "pattern": f"^{INPUTS[tool]}$"}},
                "required": ["tool", "input"],
                "additionalProperties": False,
            }
            for tool in tools
        ]
    }


OPERATORS: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
}


def calculate(expression: str) -> str:
    """Sums, differences, products and quotients of numbers; never `eval` on what a model wrote."""

    def value(node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=int() | float() as number):
                return number
            case ast.BinOp(left, op, right) if type(op) in OPERATORS:
                return OPERATORS[type(op)](value(left), value(right))
            case ast.UnaryOp(op, operand) if type(op) in OPERATORS:
                return OPERATORS[type(op)](value(operand))
        raise ValueError(f"expected numbers and + - * /, got {ast.unparse(node)}")

    try:
        return str(value(ast.parse(expression.strip(), mode="eval").body))
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError) as e:
        return f"error: {e}"  # the model may try again


def search(word: str, folder: Path) -> str:
    """The first three lines that contain a word, in the text files of a folder."""
    found = (
        line.strip()
        for path in sorted(folder.glob("*.txt"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if word.lower() in line.lower()
    )
    return "\n".join(line for line, _ in zip(found, range(3), strict=False)) or f"no line contains {word!r}"


@contextlib.contextmanager
def serve(bundle: Path) -> Iterator[str]:
    """The address of a lococo-serve that ends with the block."""
    command = [sys.executable, "-m", "lococo_server", str(bundle), "--port", "0", "--sessions", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            # its address is the one line on its stdout, and comes as soon as it takes requests
            if server.stdout is None or not (address := server.stdout.readline().strip()):
                raise SystemExit("lococo-serve did not start")  # it has said why
            yield address
        finally:
            server.terminate()


def run(client: OpenAI, question: str, folder: Path, max_steps: int = 5) -> str | None:
    """The answer, or None if there is none after max_steps.

    Every request has the whole conversation, of which the server reads what is new: it keeps the state of the last one.
    """
    model = client.models.list().data[0].id
    messages: list[ChatCompletionMessageParam] = [
        {"role": "system", "content": SYSTEM},
        *EXAMPLE,
        {"role": "user", "content": question},
    ]
    for step in range(max_steps):
        tools = ("calculator", "search", "answer") if step else ("calculator", "search")  # small models like to guess
        reply = client.chat.completions.create(
            model=model,
            messages=messages,
            response_format={"type": "json_schema", "json_schema": {"name": "action", "schema": action_schema(*tools)}},
            temperature=0,
            max_tokens=600,
        )
        content = reply.choices[0].message.content or ""
        print(content, file=sys.stderr)
        action = json.loads(content)
        if action["tool"] == "answer":
            return str(action["input"])
        result = calculate(action["input"]) if action["tool"] == "calculator" else search(action["input"], folder)
        print(f"  {result}", file=sys.stderr)
        messages += [
            {"role": "assistant", "content": content},
            {"role": "user", "content": f"{action['tool']}: {result}"},
        ]
    return None


def main() -> int:
    """Prints the answer on stdout, and the steps to it on stderr."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path, help="directory made by lococo-export, with a chat template")
    parser.add_argument("question")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="text files to search")
    args = parser.parse_args()
    with serve(args.bundle) as address:
        answer = run(OpenAI(base_url=f"{address}/v1", api_key="none"), args.question, args.folder)
    if answer is None:
        print("the model found no answer", file=sys.stderr)
        return 1
    print(answer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
