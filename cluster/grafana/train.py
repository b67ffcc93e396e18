"""Panels of train.json."""

from panels import NODES, Panel, Row, gauge, own

__all__ = ["TRAIN"]

TRAIN = [
    Row(
        "Loss",
        [
            Panel(
                "loss",
                "short",
                [
                    (own("ray_ldm_train_loss"), "{{run}}"),
                    (own("ray_ldm_train_validation_loss"), "{{run}} held out"),
                ],
            ),
            Panel("terms of a loss", "short", [(own("ray_ldm_train_loss_term"), "{{run}} {{term}}")], "VAEs"),
            Panel("gradient norm", "short", [(own("ray_ldm_train_gradient_norm"), "{{run}}")]),
        ],
    ),
    Row(
        "Speed",
        [
            Panel("images", "ops", [(own("ray_ldm_train_images_per_second"), "{{run}}")], "all workers"),
            Panel("steps", "ops", [(own("ray_ldm_train_steps_per_second"), "{{run}}")]),
            Panel(
                "waiting for data",
                "percentunit",
                [(own("ray_ldm_train_data_wait_share"), "{{run}}")],
                "share of the time; well above 0: the loader or the store is too slow",
            ),
        ],
    ),
    Row(
        "Progress",
        [
            Panel("steps taken", "short", [(own("ray_ldm_train_step"), "{{run}}")], width=6),
            Panel(
                "time",
                "s",
                [
                    (own("ray_ldm_train_seconds_left"), "{{run}} left"),
                    (own("ray_ldm_train_seconds"), "{{run}} since this start"),
                ],
                width=6,
            ),
            Panel("learning rate", "short", [(own("ray_ldm_train_learning_rate"), "{{run}}")], width=6),
            Panel(
                "controller of Ray Train",
                "short",
                [
                    (
                        gauge("ray_train_controller_state", "ray_train_controller_state"),
                        "{{ray_train_controller_state}}",
                    )
                ],
                "restarting or resizing: workers were lost, or are to be had",
                6,
            ),
        ],
    ),
    NODES,
]
