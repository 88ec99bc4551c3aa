"""The commands of `hope`, one file for those that belong together: their arguments, and what they call.

Each file has `add(commands)`; what a command needs is imported when it runs, so that help and mistakes answer at once.
"""

import argparse

type Commands = argparse._SubParsersAction[argparse.ArgumentParser]
