"""The entry of `craft-ray`: it listens to signals before the imports, which take a second."""

from __future__ import annotations

from craft_ray import interruption


def main() -> None:
    interruption.listen()
    try:
        from craft_pipelines import cli
    except KeyboardInterrupt as error:
        from craft_pipelines.ending import end_interrupted

        end_interrupted(error)
    cli.main()


if __name__ == "__main__":
    main()
