"""The released sketcher's stack, driven by our own lines: parse with RedBaron, replace literals and names, dump.

Runs in the peers' environment and imports nothing of cert-ray. In, on standard input: JSON lines, a source text each.
Out: a JSON line each, [CPU seconds, sketch or null, why not]. Which word stands for what is described in the paper's
repository; triple-quoted strings, hexadecimal numbers and the rest of its exceptions stay. A file is given up after
`--timeout-s` seconds.
"""

import argparse
import json
import signal
import sys
import time

import redbaron

sys.setrecursionlimit(10_000)  # its parser and its dump recurse; with Python's default it fails on more files

WORDS = {
    "int": "number",
    "float": "float",
    "float_exponant": "floatexponant",
    "complex": "complex",
    "string": "string",
    "raw_string": "rawstring",
    "interpolated_string": "interstring",
    "interpolated_raw_string": "interrawstring",
    "binary_string": "binarystring",
    "unicode_string": "unicodestring",
}
KINDS = [*WORDS, "def", "class"]


class TookTooLong(BaseException):
    """Not an Exception, so that the parser's own handlers let it through."""


def give_up(*_):
    raise TookTooLong


def sketch(source):
    tree = redbaron.RedBaron(source)
    for node in tree.find_all(KINDS):
        if node.type == "def":
            node.name = "func"
        elif node.type == "class":
            node.name = "AnClass"
        elif not ('"""' in node.value or "'''" in node.value) or node.type != "string":
            node.value = WORDS[node.type]
    return tree.dumps()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--timeout-s", type=int, default=60)
    timeout_s = parser.parse_args().timeout_s
    signal.signal(signal.SIGALRM, give_up)
    for line in sys.stdin:
        source, result, problem = json.loads(line), None, None
        started = time.process_time()
        signal.alarm(timeout_s)
        try:
            result = sketch(source)
        except TookTooLong:
            problem = "timeout"
        except Exception as error:  # noqa: BLE001 - whatever a peer fails with is a failure of that file
            problem = type(error).__name__
        finally:
            signal.alarm(0)
        print(json.dumps([time.process_time() - started, result, problem]), flush=True)


if __name__ == "__main__":
    main()
