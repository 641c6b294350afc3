"""Nothing is sent or fetched: not while importing, loading, answering or tracing."""

import os
import subprocess
import sys

PROGRAM = """
import socket, sys

def refuse(*args, **kwargs):
    raise AssertionError("a socket was opened")

socket.socket.__init__ = socket.getaddrinfo = refuse

from langchain_turboquant_local import ChatTurboQuantLocal, get_turboquant_callback

model = ChatTurboQuantLocal(model=sys.argv[1], device="cpu")
with get_turboquant_callback() as measured:
    print(model.invoke("What is the capital of France?").content)
    print("".join(chunk.text for chunk in model.stream("Hello", max_tokens=5)))
print(measured.total.runs, model.profile["max_input_tokens"])
"""


def test_no_socket_is_opened(tiny_model: str) -> None:
    # An environment of its own: the variable that keeps the hub's client offline must not be what keeps it quiet.
    environment = {"PATH": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PROGRAM, tiny_model]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "The capital of France is Paris.\nHello! How\n2 4096\n"
