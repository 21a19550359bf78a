"""``python -m srengine`` is the ``srengine`` command."""

from srengine.cli import main

if __name__ == "__main__":
    main()
