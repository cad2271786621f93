"""`fseft <verb>`: the files next to this one parse and call. Heavy imports wait until a verb runs."""

from __future__ import annotations

import argparse
import sys

from fsefs_nnunet import __version__
from fsefs_nnunet.cli import (
    adapt,
    assemble,
    backbones,
    bank,
    benchmark,
    convert,
    demo,
    env,
    link,
    planning,
    predict,
    rewrite_header,
    student,
    train,
    zero_shot,
)
from fsefs_nnunet.errors import InputError

VERBS = (
    env,
    convert,
    assemble,
    planning,
    adapt,
    train,
    predict,
    student,
    zero_shot,
    benchmark,
    backbones,
    bank,
    rewrite_header,
    link,
    demo,
)


def parser() -> argparse.ArgumentParser:
    main_parser = argparse.ArgumentParser(
        prog="fseft", description="Few-shot adaptation of frozen foundation models with nnU-Net's commands."
    )
    main_parser.add_argument("--version", action="version", version=f"fseft {__version__}")
    verbs = main_parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, function, help_text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=help_text, description=help_text)
        sub.set_defaults(function=function)
        return sub

    for module in VERBS:
        module.register(verb)
    return main_parser


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        args.function(args)
    except InputError as error:
        print(f"fseft: {error}", file=sys.stderr)
        return 2
    except PermissionError as error:
        print(f"fseft: {error.filename} cannot be accessed ({error.strerror}): check its permissions.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fseft: Interrupted. Finished work is kept; run the same command again.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
