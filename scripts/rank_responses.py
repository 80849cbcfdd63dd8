"""Lets people rank sampled responses, and turns what they say into training data.

python scripts/rank_responses.py serve --database labels.db --samples samples.jsonl
python scripts/rank_responses.py export --database labels.db --output rankings.jsonl
"""

import os
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # instead of this file's folder
    from recipes.cli.start import begin

    begin(__file__)

import sqlite3
from pathlib import Path

from recipes import labelling
from recipes.cli.errors import UserError, counted
from recipes.cli.help import OneLineParser
from recipes.labelling.accounts import add_labeler, labelers, named_labeler
from recipes.labelling.answers import JUSTIFICATIONS
from recipes.labelling.database import Database
from recipes.labelling.export import export, export_command
from recipes.labelling.files import new_file
from recipes.labelling.store import Store
from recipes.labelling.tasks import read_tasks
from recipes.labelling.terminal import rank_in_terminal

MAX_NUMBER = 1_000_000
USER = os.environ.get("USER") or "labeler"
GUIDELINES = Path(labelling.__file__).with_name("guidelines.txt")


def parse_args(argv):
    parser = OneLineParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(function, name, help):
        subparser = commands.add_parser(name, help=help)
        subparser.set_defaults(function=function)
        subparser.add_argument("--database", required=True, type=Path, help="the SQLite file that holds everything")
        return subparser

    serve = command(run_serve, "serve", "the ranking page, for a browser")
    serve.add_argument("--host", default="127.0.0.1", help="%(default)s unless other machines may come in")
    serve.add_argument("--port", type=int, default=8000, help="default %(default)s; 0 takes a free one")
    terminal = command(run_terminal, "terminal", "rank in this shell")
    terminal.add_argument("--labeler", default=USER, help="whose rankings these are; default %(default)s")
    for ranking in (serve, terminal):
        several = {"nargs": "+", "action": "extend", "default": [], "type": Path}
        ranking.add_argument("--samples", help="files of sampled responses to add", **several)
        ranking.add_argument("--gold", help="rankings to add as attention tasks", **several)
        ranking.add_argument("--guidelines", default=GUIDELINES, type=Path, help="text that labelers see first")
        ranking.add_argument("--justifications", default="required", choices=JUSTIFICATIONS, help="default required")
        ranking.add_argument("--overlap", type=int, default=1, help="labelers per prompt; default %(default)s")
        ranking.add_argument("--gold_every", type=int, default=10, help="one attention task in so many (10)")

    labeler = command(run_add_labeler, "add-labeler", "add a person, and print the token to log in with")
    labeler.add_argument("name")
    labeler.add_argument("--new_token", action="store_true", help="replace the token of somebody who has one")
    exports = command(run_export, "export", "write the rankings as training data")
    exports.add_argument("--output", required=True, type=Path, help="a new .jsonl file")
    exports.add_argument("--include_gold", action="store_true", help="the rankings of attention tasks too")
    agreement = command(run_agreement, "agreement", "how far labelers agree, and how they work")
    agreement.add_argument("--format", default="text", choices=("text", "json", "html"))
    agreement.add_argument("--output", type=Path, help="a new file instead of the screen")
    backup = command(run_backup, "backup", "copy the database, also while it is in use")
    backup.add_argument("--output", required=True, type=Path, help="a new .db file")
    return parser.parse_args(argv)


def open_store(args):
    """The store of `args.database` with every file of samples in it; made where it is missing."""
    if not (1 <= args.overlap <= MAX_NUMBER and 0 <= args.gold_every <= MAX_NUMBER):
        raise UserError(f"--overlap takes 1 to {MAX_NUMBER}, and --gold_every 0 to {MAX_NUMBER}")
    try:
        guidelines = args.guidelines.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{args.guidelines}: cannot be read ({error})") from error
    files = [(path, False) for path in args.samples] + [(path, True) for path in args.gold]
    read = [(path, *read_tasks(path, gold)) for path, gold in files]  # all of them before anything is made or changed
    options = {name: getattr(args, name) for name in ("overlap", "gold_every", "justifications")}
    store = Store(args.database, create=bool(files), guidelines=guidelines, **options)
    for path, tasks, left_out in read:
        added = store.add_tasks(tasks, source=str(path.resolve()))
        notes = [f"{reason.replace('_', ' ')} left out: {number}" for reason, number in left_out.items() if number]
        print(", ".join([f"{path}: {counted(added, 'prompt')} added, {len(tasks) - added} already there", *notes]))
    size = store.size()
    if not size["prompt"]:
        raise UserError(f"{args.database}: no prompts yet; add some with --samples FILE")
    kinds = f"{counted(size['prompt'], 'prompt')}, attention tasks: {size['gold']}; labelers: {size['labeler']}"
    print(f"{args.database}: {kinds}")
    return store


def run_serve(args):
    from recipes.labelling.server import serve

    store = open_store(args)
    if known := labelers(store):
        print(f"Labelers: {', '.join(labeler.name for labeler in known)}. This makes a first or another token:")
        print(f"  python scripts/rank_responses.py add-labeler NAME --new_token --database {args.database}")
    else:
        print(f"First labeler {USER!r}, log in with this token (shown only now): {add_labeler(store, USER)}")
    if args.host not in ("127.0.0.1", "localhost", "::1"):
        print(f"Warning: {args.host} is open to other machines, and plain HTTP can be read on the way: see")
        print("docs/labelling.md for a tunnel or a proxy with TLS.")
    serve(store, args.host, args.port)


def run_terminal(args):
    store = open_store(args)
    submitted = rank_in_terminal(store, named_labeler(store, args.labeler).id)
    print(f"{counted(submitted, 'ranking')} submitted. When you have enough: {export_command(args.database)}")


def run_add_labeler(args):
    if not (args.new_token or args.database.exists()):
        print(f"{args.database} is new: serve it with --samples, or check the name.")
    database = Database(args.database, create=not args.new_token)
    print(f"Token of {args.name!r} (shown only now): {add_labeler(database, args.name, args.new_token)}")


def run_export(args):
    found = export(Database(args.database), args.output, args.include_gold)
    rankings, prompts = counted(found["rankings"], "ranking"), counted(found["prompts"], "prompt")
    print(f"{args.output}: {rankings} of {prompts} by {counted(found['labelers'], 'labeler')}")
    print(f"{counted(found['pairs'], 'pair')} to learn from; tied pairs, which give nothing: {found['tied_pairs']}")
    print(f"Rankings that are all ties: {found['all_tied']}; of attention tasks, left out: {found['gold_left_out']}")


def run_agreement(args):
    from recipes.labelling.agreement import agreement_report
    from recipes.labelling.report import render

    text = render(agreement_report(Database(args.database)), args.format, f"Agreement in {args.database.name}")
    if args.output is None:
        sys.stdout.write(text)
    else:
        with new_file(args.output) as part:
            part.write_text(text, encoding="utf-8")


def run_backup(args):
    Database(args.database).backup(args.output)
    print(f"{args.output}: copy of {args.database}")


def main(argv=None):
    args = parse_args(argv)
    try:
        args.function(args)
        return 0
    except ModuleNotFoundError as error:
        print(f"error: {args.command} needs a package: {error}; type pip install -e '.[labelling]'", file=sys.stderr)
    except (UserError, OSError, UnicodeDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
    except sqlite3.Error as error:
        print(f"error: {args.database}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 1


if __name__ == "__main__":
    sys.exit(main())
