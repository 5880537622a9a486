"""Comments on a video as it plays.

    python serve.py                                  the bundled clip with the bundled model, on the CPU
    python serve.py match.mp4 --model DIR            your video, with the model in a Hugging Face directory
    python serve.py match.mp4 --out match.vtt        captions into a file as well
    python serve.py --help                           all flags
    python serve.py --port 8000                      a server for many live streams, with a page at http://127.0.0.1:8000/

The same programs as `svlm caption` and, with --port, `svlm serve`: what they do stands in svlm_jax/commands.
"""

import sys

from svlm_jax.cli import main

if __name__ == "__main__":
    serves = any(word.partition("=")[0] == "--port" for word in sys.argv[1:])
    main(["serve" if serves else "caption", *sys.argv[1:]])
