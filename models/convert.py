"""A checkpoint in another form: the published one as ours, ours in half the bytes, or ours as the published one.

    python -m models.convert IN.pkl OUT.safetensors               # IN: anything that test.py --checkpoint takes
    python -m models.convert IN.safetensors OUT.safetensors --half
    python -m models.convert IN.safetensors OUT.pkl               # of preset paper: for the published code
"""

from pathlib import Path

from models.weights import find_checkpoint
from utils.cli import Parser, script


@script
def main(argv=None):
    parser = Parser("python -m models.convert", __doc__)
    parser.add_argument("source", metavar="IN", help="a file, a known name or hf://owner/repository/file")
    parser.add_argument("target", metavar="OUT", type=Path, help="a .safetensors or .pkl file that does not exist "
                        "yet")
    parser.add_argument("--half", action="store_true", help="store float16, which the shipped weights do not "
                        "notice")
    args = parser.parse_args(argv)
    if args.target.suffix not in (".safetensors", ".pkl") or args.half and args.target.suffix == ".pkl":
        parser.error(f"OUT is {args.target}; expected a name that ends in .safetensors, or without --half in .pkl")
    if args.target.exists():
        parser.error(f"{args.target} exists; give another name or remove it")
    source = find_checkpoint(args.source)
    from models.checkpoint import load_checkpoint, save_checkpoint, save_published  # these need PyTorch: two seconds

    network, header = load_checkpoint(source)
    args.target.parent.mkdir(parents=True, exist_ok=True)
    parameters = sum(p.numel() for p in network.parameters())
    if args.target.suffix == ".pkl":
        save_published(args.target, network, header.get("epoch", 0))
    else:
        save_checkpoint(args.target, (network.half() if args.half else network).state_dict(), network.config,
                        {**header, "converted_from": source.name})
    print(f"Written: {args.target}, {parameters:,} parameters, to be run under protocol "
          f"{header.get('protocol', 'cvg')}.")


if __name__ == "__main__":
    main()
