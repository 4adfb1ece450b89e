"""Fuzzes one decoder with atheris: `fuzz.py DECODER [options of libFuzzer] [folders of inputs]`; alone, lists them.

Ends with 0 unless an input raises what it may not, or takes longer than SECONDS; that input is kept in the working
directory.
"""

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["supsupd", "streams", "decoders"]):
    from decoders import DECODERS

WORDS = Path(__file__).with_name("words.dict")
SECONDS = 5
MEGABYTES = 2048


def main(name, *arguments):
    options = [f"-timeout={SECONDS}", f"-rss_limit_mb={MEGABYTES}", f"-dict={WORDS}"]
    atheris.Setup([sys.argv[0], *options, *arguments], DECODERS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(*sys.argv[1:])
    else:
        sys.stdout.write(" ".join(DECODERS))
