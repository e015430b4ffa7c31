"""lm-eval's command, which knows one model more: python -m distill.lm_eval --model distill-teacher ...

From the release after 0.4.13 on, lm-eval reads the entry points "lm_eval.models" (its docs/plugins.md), and
pyproject.toml declares ours: its own `lm_eval` command finds the model then, and this file goes. 0.4.13 knows the names
of its own table only, and imports nothing of anybody else's before it looks `--model` up.
"""

NAME = "distill-teacher"
TARGET = "distill.lm_eval_teacher:TeacherLM"


def register() -> None:
    """Add the name to lm-eval's table of models; torch and the model's code are imported when it is asked for."""
    import lm_eval.models  # noqa: F401  (its own names first: it adds them only to a table that is empty)
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target=TARGET)


def main() -> None:
    from lm_eval.__main__ import cli_evaluate

    register()
    cli_evaluate()


if __name__ == "__main__":
    main()
