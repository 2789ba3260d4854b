"""python -m tests.hosts.attach [--short] [--as VERSION]: tiny families over PiKV against the ordinary cache of the installed transformers.

Greedy tokens of generate() must be the same with attach and with a cache that is passed under either word, and so must the logits of a
prompt. The last line says "passed" or what was wrong; the exit status is 1 then.
--as: what the version is taken for, so that the first cause is seen behind a refusal by version.
"""

import argparse
import sys
import warnings

FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3", "deepseek_v2", "qwen2_moe", "gpt_oss", "gemma2", "qwen3_next", "olmoe")
SHORT = ("mixtral", "deepseek_v3", "gpt_oss")  # windows, latents, both kinds of layers


def compare(family: str) -> None:
    """Raises: whatever differs or fails."""
    import torch

    import pikv_ds
    from tests.tiny_models import prompt, tiny_model

    model, ids = tiny_model(family), prompt(24, 0)
    greedy = {"max_new_tokens": 8, "do_sample": False}
    with torch.no_grad():
        logits, tokens = model(ids).logits, model.generate(ids, **greedy)
        with pikv_ds.attach(model, {"page_size": 16}) as attached:
            found = {
                "attach": model.generate(ids, **greedy),
                "cache=": model.generate(ids, cache=attached.new_cache(), **greedy),
                "past_key_values=": model.generate(ids, past_key_values=attached.new_cache(), **greedy),
            }
            wrong = [name for name, got in found.items() if not torch.equal(got, tokens)]
            assert not wrong, f"tokens differ from those of the ordinary cache with {', '.join(wrong)}"
            assert attached.stats()["entries_live"], "nothing went through PiKV"
            for name in ("cache", "past_key_values"):
                torch.testing.assert_close(model(ids, **{name: attached.new_cache()}).logits, logits, rtol=0, atol=2e-5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help=f"{', '.join(SHORT)} only")
    parser.add_argument("--as", dest="taken_for", metavar="VERSION", help="what the installed version is taken for")
    args = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)  # of the older word
    import tests.tiny_models  # noqa: F401  before 5.19 transformers replaces itself in sys.modules when a model is imported

    transformers = sys.modules["transformers"]
    print(f"transformers {transformers.__version__} in {transformers.__path__[0]}")
    transformers.__version__ = args.taken_for or transformers.__version__
    for family in SHORT if args.short else FAMILIES:
        try:
            compare(family)
        except Exception as error:  # noqa: BLE001  of any kind, and all of it is told
            print(f"{family}: {type(error).__name__}: {' '.join(str(error).split())}")
            return 1
        print(f"{family}: same")
    print("passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
