"""A checkpoint in another form: the published one as ours, ours in half the bytes, ours as the published one, or the
mean of several.

    python -m models.convert IN.pkl OUT.safetensors               # IN: anything that test.py --checkpoint takes
    python -m models.convert IN.safetensors OUT.safetensors --half
    python -m models.convert IN.safetensors OUT.pkl               # of preset paper: for the published code
    python -m models.convert IN.safetensors OUT.safetensors --mean-with OTHER.safetensors

The mean of the weights of trainings that began alike is often better than each of them (model soups; Wortsman et al.,
ICML 2022). The header is that of IN.
"""

from pathlib import Path

from datasets.leakage import together
from models.weights import find_checkpoint
from utils.cli import Parser, script
from utils.errors import InputError
from utils.files import hash16


def mean_weights(networks) -> dict:
    """The mean of the weights of networks of one architecture. Raises InputError for others."""
    if any(network.config != networks[0].config for network in networks):
        raise InputError("The checkpoints hold different architectures; a mean needs the same one.")
    states = [network.state_dict() for network in networks]
    return {name: sum(state[name] for state in states) / len(states) for name in states[0]}


@script
def main(argv=None):
    parser = Parser("python -m models.convert", __doc__)
    parser.add_argument("source", metavar="IN", help="a file, a known name or hf://owner/repository/file")
    parser.add_argument("target", metavar="OUT", type=Path, help="a .safetensors or .pkl file that does not exist "
                        "yet")
    parser.add_argument("--half", action="store_true", help="store float16, which the shipped weights do not "
                        "notice")
    parser.add_argument("--mean-with", nargs="+", default=[], metavar="OTHER", help="write the mean of the weights of "
                        "IN and of these (default: those of IN)")
    args = parser.parse_args(argv)
    if args.target.suffix not in (".safetensors", ".pkl") or args.half and args.target.suffix == ".pkl":
        parser.error(f"OUT is {args.target}; expected a name that ends in .safetensors, or without --half in .pkl")
    if args.target.exists():
        parser.error(f"{args.target} exists; give another name or remove it")
    source, *others = map(find_checkpoint, (args.source, *args.mean_with))
    from models.checkpoint import load_checkpoint, save_checkpoint, save_published  # these need PyTorch: two seconds

    network, header = load_checkpoint(source)
    about = {**header, "converted_from": source.name}
    if others:
        networks, headers = zip((network, header), *map(load_checkpoint, others), strict=True)
        network.load_state_dict(mean_weights(networks))
        about |= {"traces": together(*(one.get("traces") for one in headers)),
                  "mean_of": [hash16(path) for path in (source, *others)]}
    args.target.parent.mkdir(parents=True, exist_ok=True)
    parameters = sum(p.numel() for p in network.parameters())
    if args.target.suffix == ".pkl":
        save_published(args.target, network, header.get("epoch", 0))
    else:
        save_checkpoint(args.target, (network.half() if args.half else network).state_dict(), network.config, about)
    print(f"Written: {args.target}, {parameters:,} parameters, to be run under protocol "
          f"{header.get('protocol', 'cvg')}.")


if __name__ == "__main__":
    main()
