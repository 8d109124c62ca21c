"""Upload exports and checkpoints to a bucket, a folder or a hub, or finish an interrupted upload.

    plt upload runs/mine
    plt upload exported --to hf://owner/name@main

A run's exports and checkpoints go where its configuration says (checkpoint.exports.upload_to, checkpoint.uploads.to):
those queued by training, and any others missing there. Does not resend what has arrived. Writes the file that marks a
copy as complete last.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from plt_megatron.commands import CommandParser, command
from plt_megatron.errors import AttemptFailed, UserError, clean_up_when_terminated, print_error


def _arguments(parser: CommandParser) -> None:
    parser.epilog = (
        "Exit status: 0 everything is there, 1 an upload of a run failed or now would (--check), 2 something for you "
        "to fix."
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a run's folder, or an export or a checkpoint")
    parser.add_argument(
        "--to",
        metavar="URL",
        help="destination of one export or checkpoint: s3://bucket/folder, file:///folder, hf://owner/name@revision",
    )
    parser.add_argument("--check", action="store_true", help="only check that a run's destinations can be written")
    parser.add_argument(
        "--verify", action="store_true", help="read copies back from a bucket or folder and compare their SHA-256"
    )
    parser.add_argument("--waiting", action="store_true", help="upload only what training has queued")


@command("upload", __doc__, _arguments, interrupted="interrupted: the same command continues")
def main(arguments: argparse.Namespace) -> int:
    clean_up_when_terminated()
    from plt_megatron.run_folder.folder import RunFolder
    from plt_megatron.storage.run_uploads import RunUploads, describe, upload_folder

    run = RunFolder(arguments.folder)
    if not run.config_file.is_file():
        for_runs = arguments.check or arguments.waiting
        if arguments.to is None or for_runs:
            if not arguments.folder.is_dir():
                what = f"is a file: give its folder, {arguments.folder.parent}"
                raise UserError(f"{arguments.folder} {what if arguments.folder.is_file() else 'not found'}")
            what = "--check and --waiting are for runs" if for_runs else "give --to URL"
            raise UserError(f"{arguments.folder} is not a run's folder: {what}")
        started = time.monotonic()
        uploaded = upload_folder(arguments.folder, arguments.to, verify=arguments.verify)
        print(describe(arguments.to, uploaded, time.monotonic() - started))
        return 0
    if arguments.to is not None:
        raise UserError("--to is for one export or checkpoint; a run's configuration names its destinations")
    uploads = RunUploads(run.config(), run, lambda line: print(line, flush=True))
    if arguments.check:
        try:
            uploads.check()
        except AttemptFailed as error:
            print_error(error)
            return 1
        print("all destinations can be written")
        return 0
    if not arguments.waiting:
        uploads.add_all()
    # What training queued has not failed while somebody uploads it by hand: training's own process waits a while.
    return 0 if uploads.work(verify=arguments.verify, wait=arguments.waiting) else 1
