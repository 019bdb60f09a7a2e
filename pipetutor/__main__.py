"""``python -m pipetutor COMMAND``: the one way into every command; ``COMMAND --help`` lists its flags."""

import runpy
import sys

COMMANDS = {
    "train": "what each rank of a run does: deepspeed --num_gpus 2 --module pipetutor.train",
    "certify": "does the pipeline compute what one process computes?",
    "costs": "what does each layer cost on this machine?",
    "plan": "which stages, replicas, micro-batches and schedule are best on a cluster?",
    "scores": "the answers of a class to the puzzles, graded and ranked",
    "view": "a run's trace in Perfetto's own interface, without network",
    "weights": "write a checkpoint's weights as a torchvision state_dict",
}
# Of commands that are not called as their modules
MODULES = {"plan": "planner", "scores": "lessons.scores", "view": "tracing.view"}


def main() -> None:
    """Run a command as ``python -m pipetutor.MODULE`` does; without a known one, list them."""
    asked = sys.argv[1] if len(sys.argv) > 1 else ""
    if asked in COMMANDS:
        del sys.argv[1]
        runpy.run_module(f"pipetutor.{MODULES.get(asked, asked)}", run_name="__main__", alter_sys=True)
        return
    helps = asked in ("-h", "--help")
    stream = sys.stdout if helps else sys.stderr
    if not helps:
        print(f"pipetutor: {f'no command is called {asked!r}' if asked else 'which command?'}", file=stream)
    print("python -m pipetutor COMMAND, where COMMAND is one of", file=stream)
    for name, words in COMMANDS.items():
        print(f"    {name:8} {words}", file=stream)
    sys.exit(0 if helps else 2)


if __name__ == "__main__":
    main()
