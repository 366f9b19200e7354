"""`python -m modelscope_dolly.cli`, the same as `dolly`."""

import sys

from modelscope_dolly.cli.main import main

sys.exit(main())
