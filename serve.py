"""Comments on a video as it plays.

    python serve.py                                  the bundled clip with the bundled model, on the CPU
    python serve.py match.mp4 --model DIR            your video, with the model in a Hugging Face directory
    python serve.py match.mp4 --out match.vtt        captions into a file as well
    python serve.py --help                           all flags

The same program as `svlm caption`: what it does stands in svlm_jax/commands/caption.py.
"""

import sys

from svlm_jax.cli import main

if __name__ == "__main__":
    main(["caption", *sys.argv[1:]])
