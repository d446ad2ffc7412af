"""``python -m examples.annotations INPUT.jsonl``"""

import sys

from examples.annotations.cli import main

if __name__ == "__main__":
    sys.exit(main())
