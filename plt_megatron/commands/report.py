"""Report on a sweep: which loop count wins at equal tokens, FLOPs and decoding latency, with error bars.

    plt report runs/sweeps/paper_ablation --measure-decode

Writes index.html (one page, works offline and prints), report.md, CSVs and PNGs to SWEEP_DIR/report. Reports on
unfinished sweeps too, and says what is missing.
"""

from __future__ import annotations

import argparse

from plt_megatron.commands import CommandParser, command, whole


def _arguments(parser: CommandParser) -> None:
    parser.add_argument("sweep", metavar="SWEEP_DIR", help="a sweep's folder or its archive")
    parser.add_argument("--output", metavar="DIR", help="default: SWEEP_DIR/report")
    decode = parser.add_argument_group("decoding time")
    decode.add_argument(
        "--measure-decode",
        action="store_true",
        help="export a finished run of each row and time its decoding here; later reports reuse the times",
    )
    decode.add_argument(
        "--decode-batch", type=whole(1), default=4, metavar="N", help="sequences in a batch (default: 4)"
    )
    decode.add_argument(
        "--decode-prefill", type=whole(1), default=128, metavar="N", help="tokens already in the cache (default: 128)"
    )
    decode.add_argument(
        "--decode-tokens", type=whole(1), default=96, metavar="N", help="tokens to decode (default: 96)"
    )


@command("report", __doc__, _arguments)
def main(arguments: argparse.Namespace) -> None:
    from plt_megatron.extras import require

    require("plt report", "jinja2", "scipy", *(["transformers"] if arguments.measure_decode else []))
    from plt_megatron.experiments.decode_time import DecodeProtocol
    from plt_megatron.experiments.pages import PAGE
    from plt_megatron.experiments.sweep_report import write_report

    if arguments.decode_tokens % DecodeProtocol.slice:
        raise argparse.ArgumentError(None, f"--decode-tokens must be a multiple of {DecodeProtocol.slice}")
    protocol = None
    if arguments.measure_decode:
        protocol = DecodeProtocol(arguments.decode_batch, arguments.decode_prefill, arguments.decode_tokens)
    report = write_report(arguments.sweep, arguments.output, protocol)
    for problem in report.problems:
        print(f"note: {problem}")
    for verdict in report.verdicts:
        print(f"{verdict.asked}: {verdict.text}")
    for answer in report.answers:
        group = f"{answer.group}, " if answer.group else ""
        print(f"{group}{answer.question}? {answer.text}")
    print(f"report: {report.folder / PAGE}")
