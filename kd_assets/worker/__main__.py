import sys

from kd_assets.worker.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv))
