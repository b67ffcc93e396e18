"""The ``ldm`` command: finds the job that is asked for, runs it, turns its end into an exit status.

Only the standard library is imported here, and a job's module only when that job runs, so that
``ldm --help`` does not wait for torch and ray.
"""

import sys
from collections.abc import Iterable, Sequence

__all__ = ["COMMANDS", "main"]

DONE, FAILURE, USER_ERROR, INTERRUPTED = 0, 1, 2, 130

# What is typed after `ldm` -> (module that holds the job, its line in `ldm --help`).
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("jobs.demo", "real photos to latents to a trained U-Net to images, with a report"),
    "shards": ("jobs.shards", "pack folders of images into WebDataset tars"),
    "encode": ("jobs.encode", "encode image shards into a latent dataset"),
    "verify": ("jobs.verify", "prove a latent dataset: every row, file, key and statistic"),
    "gc": ("jobs.gc", "remove what killed writers and edited shards left in a latent dataset"),
    "stats": ("jobs.stats", "statistics of a latent dataset: shift and scale per channel"),
    "train": ("jobs.train", "train a U-Net on a latent dataset"),
    "train-vae": ("jobs.train_vae", "train a VAE on images, or continue from another one"),
    "bench encode": ("jobs.bench_encode", "how fast and lean encoding is here, beside other ways"),
    "bench train": ("jobs.bench_train", "how fast and lean training is here, beside other ways"),
    "bench tiling": ("jobs.bench_tiling", "how exact, fast and lean decoding large images is here"),
    "bench serve": ("jobs.bench_serve", "what batching by step, deadlines and scaling do here"),
    "bench cluster": ("jobs.bench_cluster", "how encoding grows with nodes, and pools with work"),
    "evaluate recon": ("jobs.evaluate_recon", "quality of a VAE's reconstructions: PSNR, SSIM, rFID"),
    "evaluate by-f": ("jobs.evaluate_by_f", "quality of VAEs over bits per pixel, and their speed"),
    "evaluate samples": ("jobs.evaluate_samples", "a checkpoint's images beside real ones: FID, KID"),
    "runs": ("jobs.runs", "runs and their figures: list, compare, what was made of what"),
    "plan": ("jobs.plan", "nodes, hours and cost, from measured rates and given prices"),
    "savings": ("jobs.savings", "what latents save over pixels, beside what is usually claimed"),
    "serve": ("jobs.serve", "serve images over HTTP: OpenAI's API, long jobs, and a page"),
    "sample": ("jobs.sample", "generate images from a checkpoint"),
    "generate": ("jobs.generate", "make a dataset of images with a checkpoint: tars with labels"),
    "upscale": ("jobs.upscale", "enlarge an image or a latent with a cascade of upsamplers"),
    "interpolate": ("jobs.interpolate", "images on the way between two images, latents or seeds"),
    "edit": ("jobs.edit", "change an image: noise and denoise it, or add a direction"),
    "inpaint": ("jobs.inpaint", "repaint what a mask covers with a checkpoint"),
    "direction": ("jobs.direction", "the direction of an attribute in a latent dataset"),
    "decode": ("jobs.decode", "decode a latent into an image"),
    "cluster up": ("jobs.cluster_up", "a Ray cluster of several nodes on this machine, to try one"),
    "submit": ("jobs.submit", "run a job of a YAML file on a Ray cluster, through its job server"),
    "jobs list": ("jobs.jobs_list", "jobs that were submitted to a cluster, and how they ended"),
    "jobs logs": ("jobs.jobs_logs", "what a submitted job has printed"),
    "jobs stop": ("jobs.jobs_stop", "stop a submitted job"),
    "chain": ("jobs.chain", "jobs in order, here or on a cluster; again to do what is missing"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one ``ldm`` command line (default: ``sys.argv[1:]``) and return its exit status.

    0 done; 1 failure, with a traceback; 2 user error, one line on stderr; 130 interrupted.
    ``ldm JOB --help`` leaves through ``SystemExit(0)``, as argparse does.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(overview(COMMANDS))
        return DONE
    if args[0] == "--version":
        print(f"ldm {installed_version()}")
        return DONE
    command = longest_command(args)
    if command is None:
        return without_command(args)
    return run_job(command, args[len(command.split()) :])


def longest_command(args: Sequence[str]) -> str | None:
    """The longest run of leading words that is a key of ``COMMANDS``."""
    candidates = (" ".join(args[:count]) for count in range(len(args), 0, -1))
    return next((candidate for candidate in candidates if candidate in COMMANDS), None)


def without_command(args: Sequence[str]) -> int:
    """Answer a line that names no job: list the forms of its first word, or name the nearest job."""
    forms = [command for command in COMMANDS if command.startswith(f"{args[0]} ")]
    if forms and (len(args) == 1 or args[1] in ("-h", "--help")):
        print(overview(forms))
        return DONE
    asked = " ".join(args[:2]) if forms else args[0]
    print(f"ldm: error: {unknown_command(asked, forms or list(COMMANDS))}", file=sys.stderr)
    return USER_ERROR


def unknown_command(asked: str, known: Sequence[str]) -> str:
    """One line that says what ``asked`` may have meant."""
    from difflib import get_close_matches

    nearest = get_close_matches(asked, known, n=1, cutoff=0.5)
    hint = f"did you mean '{nearest[0]}'?" if nearest else f"allowed: {', '.join(known)}"
    return f"unknown command '{asked}'; {hint}"


def overview(commands: Iterable[str]) -> str:
    """The text of ``ldm --help`` for these keys of ``COMMANDS``."""
    rows = "\n".join(f"  {command:<18}{COMMANDS[command][1]}" for command in commands)
    return (
        "usage: ldm COMMAND [options]\n\n"
        "Train and serve latent diffusion models on Ray.\n\n"
        f"commands:\n{rows}\n\n"
        "ldm COMMAND --help shows its options; ldm --version the version."
    )


def installed_version() -> str:
    """Version of the installed ``ray-ldm`` distribution."""
    from importlib.metadata import version

    return version("ray-ldm")


def run_job(command: str, args: Sequence[str]) -> int:
    """Load the job's config from ``args``, run it, and return the exit status."""
    prog = f"ldm {command}"
    try:
        _load_and_run(command, args)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as failure:  # noqa: BLE001 - the edge of the process: reported, then the exit status
        from jobs.failures import report

        # A job elsewhere that this one waited for has a status of its own.
        return USER_ERROR if report(prog, failure) else int(getattr(failure, "exit_status", FAILURE))
    return DONE


def _load_and_run(command: str, args: Sequence[str]) -> None:
    from importlib import import_module

    from jobs.config import job_class, load
    from jobs.current_run import recorded

    module_name, _ = COMMANDS[command]
    config, as_json = load(job_class(import_module(module_name)), command, args)
    with recorded(command, args, config) as tell:
        result = config.run()
        tell(result)
    if as_json:
        from pydantic_core import to_json

        print(to_json(result, inf_nan_mode="strings").decode(), flush=True)


if __name__ == "__main__":
    sys.exit(main())
