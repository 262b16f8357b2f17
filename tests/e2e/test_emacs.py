"""Eglot with albor-lsp in a real Emacs, as docs/editors.md writes it, with the real servers."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.e2e.stack import CODE, ROOT, editor, environment

pytestmark = pytest.mark.e2e

TRY = """
(package-initialize)
(unless (require 'eglot nil t) (message "no eglot") (kill-emacs 3))
(setq eglot-sync-connect t eglot-connect-timeout 60)
{documented}
(find-file "{file}")
(eglot-ensure)
(run-hooks 'post-command-hook)
(goto-char (point-max))
(skip-chars-backward "\\n")
(insert "so")
(eglot--signal-textDocument/didChange)
(defun items () (let ((capf (eglot-completion-at-point))) (all-completions "" (nth 2 capf))))
(let ((tries 0))
  (while (and (< tries 60) (null (items)))
    (setq tries (1+ tries))
    (accept-process-output nil 0.5)))
(let* ((capf (eglot-completion-at-point))
       (item (car (all-completions "" (nth 2 capf)))))
  (delete-region (nth 0 capf) (nth 1 capf))
  (insert item)
  (funcall (plist-get (nthcdr 3 capf) :exit-function) item 'finished))
(save-buffer)
(eglot-shutdown-all)
"""


def test_eglot_offers_the_suggestion_and_takes_it_over(tmp_path: Path) -> None:
    program = editor("emacs", "ALBOR_EMACS")
    page = (ROOT / "docs" / "editors.md").read_text()
    [documented] = re.findall(r"```elisp\n(\(with-eval-after-load 'eglot.*?)```", page, re.DOTALL)
    file = tmp_path / "project" / "stats.py"
    file.parent.mkdir()
    file.write_text(CODE)
    script = tmp_path / "try.el"
    script.write_text(TRY.format(documented=documented, file=file))
    done = subprocess.run(
        [program, "--batch", "-l", str(script)],
        env=environment(tmp_path), cwd=file.parent, capture_output=True, text=True, timeout=150,
    )  # fmt: skip
    if done.returncode == 3:
        pytest.skip("this Emacs has no eglot")
    assert done.returncode == 0, done.stderr
    assert "    ordered = sorted(values" in file.read_text()
