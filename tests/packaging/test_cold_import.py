"""A fresh process without Triton, Haystack and LangChain imports the package and attends on packed data."""

import subprocess
import sys
import textwrap

BLOCK = """
    import sys

    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in {"triton", "haystack", "langchain_core"}:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Absent())
"""


def run(code: str) -> str:
    """Run code in a new interpreter with warnings as errors of our own modules, and return what it printed."""
    source = textwrap.dedent(BLOCK) + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_reference_path_runs_without_triton_and_frameworks() -> None:
    printed = run(
        """
        from turboquant_local import TurboQuantCache
        from turboquant_local.testing import random_tokens, tiny_model

        model = tiny_model("llama")
        cache = TurboQuantCache(model.config)
        model.generate(random_tokens(1, 200), past_key_values=cache, max_new_tokens=2)
        assert cache.stats.attention["reference"] > 0, cache.stats.attention
        print(cache.kv_cache.packed_length(cache.get_seq_length()))
        """
    )
    assert int(printed) > 0


def test_importing_touches_no_framework_and_no_device() -> None:
    printed = run(
        """
        import torch
        import turboquant_local
        loaded = {name.split(".")[0] for name in sys.modules}
        print(sorted(loaded & {"haystack", "haystack_integrations", "langchain_core", "triton"}))
        assert not torch.cuda.is_initialized()
        """
    )
    assert printed == "[]"


def test_the_haystack_adapter_says_what_is_missing() -> None:
    printed = run(
        """
        try:
            import haystack_integrations.components.generators.turboquant_local
        except ImportError as error:
            print(error)
        """
    )
    assert "haystack" in printed
