"""Logs as JSON lines that name their run: ``LDM_LOG_FORMAT=json``, for a job's process and its workers.

Ray's own structured logging makes them (`ray.LoggingConfig`), in every process of the job; what is added here
is ``run_id`` and ``stage``, which a run has in its environment.
"""

import logging
import os
from typing import Any

from ldm.errors import UserError

__all__ = ["RUN_ID", "STAGE", "is_json", "name_records", "ray_options"]

FORMAT = "LDM_LOG_FORMAT"
FORMATS = ("text", "json")
# In the environment of a run and of its workers.
RUN_ID, STAGE = "LDM_RUN_ID", "LDM_STAGE"
ADDED = {"run_id": RUN_ID, "stage": STAGE}
# Of the record itself; Ray adds time, level, message, place, process, and the ids of node, worker and task.
STANDARD = ["name"]


def is_json() -> bool:
    """Whether the environment asks for it. UserError where it asks for something else."""
    given = os.environ.get(FORMAT, FORMATS[0])
    if given not in FORMATS:
        raise UserError(f"{FORMAT} is {given!r}", allowed=", ".join(FORMATS))
    return given == "json"


def ray_options() -> dict[str, Any]:
    """For ``ray.init``; nothing where logs are text."""
    if not is_json():
        return {}
    import ray

    environment = {name: os.environ[name] for name in ADDED.values() if name in os.environ}
    return {
        "logging_config": ray.LoggingConfig(
            encoding="JSON", log_level="INFO", additional_log_standard_attrs=STANDARD
        ),
        "runtime_env": {
            "env_vars": environment,
            "worker_process_setup_hook": f"{__name__}.{name_records.__name__}",
        },
    }


def name_records() -> None:
    """From now on every log record of this process has ``run_id`` and ``stage``, where there are such."""
    made = logging.getLogRecordFactory()
    names = {name: os.environ[variable] for name, variable in ADDED.items() if variable in os.environ}

    def named(*args: Any, **options: Any) -> logging.LogRecord:
        record = made(*args, **options)
        vars(record).update(names)
        return record

    logging.setLogRecordFactory(named)
