"""The server against its own OpenAPI description: whatever request is made up from it, nothing fails.

Against any running server, and for longer (made-up answers may be as long as the context, so keep that short):

    python -m qwenvl_mlx.server --model demo --max-kv-size 256
    schemathesis run http://127.0.0.1:8000/openapi.json --max-examples 1000 --checks not_a_server_error
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from serving import post

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
    "response_headers_conformance,negative_data_rejection"
)


def test_no_request_makes_the_server_fail(trusting_url: str, tmp_path: Path) -> None:
    program = shutil.which("schemathesis", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("requests are made up by schemathesis, which is not installed")
    command = [program, "run", f"{trusting_url}/openapi.json", "--checks", CHECKS, "--phases", "fuzzing"]
    command += ["--max-examples", "15", "--request-timeout", "20", "--generation-database", "none"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert post(f"{trusting_url}/v1/completions", {"model": "m", "prompt": "say:well"})[0] == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("route", "asked"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "say:well"}]}),
        ("/v1/completions", {"prompt": "say:well"}),
    ],
)
def test_both_forms_of_an_answer_are_as_documented(
    trusting_url: str, route: str, asked: dict[str, object], stream: bool
) -> None:
    schemathesis = pytest.importorskip("schemathesis", reason="it checks answers by the description")
    operation = schemathesis.openapi.from_url(f"{trusting_url}/openapi.json")[route]["POST"]
    case = operation.Case(body=asked | {"model": "m", "stream": stream}, media_type="application/json")
    answer = case.call_and_validate()
    assert answer.status_code == 200
    assert answer.headers["content-type"][0].startswith("text/event-stream" if stream else "application/json")
