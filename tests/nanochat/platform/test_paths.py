from tests.conftest import assert_fails_with, nanochat


def test_without_home_or_base_directory_there_is_a_clear_error(tmp_path):
    import os
    import subprocess
    import sys

    env = {k: v for k, v in os.environ.items() if k not in ("HOME", "NANOCHAT_BASE_DIR")}
    result = subprocess.run(
        [sys.executable, "-m", "nanochat", "report"], capture_output=True, text=True, env=env, cwd=tmp_path
    )
    assert_fails_with(result, "NANOCHAT_BASE_DIR")
    assert not list(tmp_path.iterdir())


def test_an_unwritable_base_directory_is_refused(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    assert_fails_with(nanochat(blocked / "base", "data", "generate"), str(blocked / "base"), "NANOCHAT_BASE_DIR")
