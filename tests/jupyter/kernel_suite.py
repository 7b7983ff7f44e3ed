"""What jupyter_kernel_test is told about the kernel, and patience for an emulated machine. Knows no way to a kernel."""

from __future__ import annotations

from typing import Any, ClassVar

import jupyter_kernel_test

# jupyter_kernel_test allows iopub 0.1 s after the reply; an emulated machine is some twenty times slower than that.
PATIENCE_S = 60


class PythonKernelSuite(jupyter_kernel_test.KernelTests):
    """The whole suite. Subclasses set `km` and `kc` in setUpClass."""

    # Otherwise pytest would run this class itself.
    __test__ = False

    language_name = "python"
    file_extension = ".py"
    code_hello_world = "print('hello, world')"
    code_stderr = "import sys; print('test', file=sys.stderr)"
    completion_samples: ClassVar[list[dict[str, Any]]] = [{"text": "zi", "matches": {"zip"}}]
    complete_code_samples: ClassVar[list[str]] = ["1", "print('hello, world')", "def f(x):\n  return x*2\n\n\n"]
    incomplete_code_samples: ClassVar[list[str]] = ["print('''hello", "def f(x):\n  x*2"]
    invalid_code_samples: ClassVar[list[str]] = ["import = 7q"]
    code_page_something = "zip?"
    code_generate_error = "raise"
    code_execute_result: ClassVar[list[dict[str, str]]] = [
        {"code": "1+2+3", "result": "6"},
        {"code": "[n*n for n in range(1, 4)]", "result": "[1, 4, 9]"},
    ]
    code_display_data: ClassVar[list[dict[str, str]]] = [
        {"code": "from IPython.display import HTML, display; display(HTML('<b>test</b>'))", "mime": "text/html"},
        {"code": "from IPython.display import Math, display; display(Math('\\\\frac{1}{2}'))", "mime": "text/latex"},
    ]
    code_history_pattern = "1?2*"
    # ipykernel answers a range with session 0, so its own tests leave "range" out, too.
    supported_history_operations = ("tail", "search")
    code_inspect_sample = "zip"
    code_clear_output = "from IPython.display import clear_output; clear_output()"

    def execute_helper(self, code: str, timeout: int = PATIENCE_S, **options: Any) -> Any:
        impatient = self.kc.iopub_channel.get_msg

        def patient(*, timeout: float | None = None) -> Any:
            return jupyter_kernel_test.ensure_sync(impatient)(timeout=PATIENCE_S)

        self.kc.iopub_channel.get_msg = patient
        try:
            return super().execute_helper(code, timeout=timeout, **options)
        finally:
            self.kc.iopub_channel.get_msg = impatient
