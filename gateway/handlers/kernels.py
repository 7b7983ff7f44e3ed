"""Jupyter's kernels: a kernel is a sandbox, its id the sandbox's."""

from __future__ import annotations

from gateway.endpoint import Call, Routes
from gateway.errors import ApiError
from gateway.models import CreateKernel, KernelAnswer
from kernels.errors import UnknownSandboxError
from kernels.models import CreateSandbox, Sandbox

routes = Routes()

# What `SandboxService.create` may end with (gateway/errors.py).
CREATE_ERRORS = (400, 403, 404, 409, 413, 500, 502, 503, 504)


def create_request(body: CreateKernel, default_template: str) -> CreateSandbox:
    """Errors: ApiError 400 for resources that make no sense."""
    try:
        return body.to_create(default_template)
    except ValueError as error:
        raise ApiError(400, "invalid_request", f"env: {error}") from error


def find(call: Call) -> Sandbox:
    """The sandbox of the request's path. Errors: ApiError 404 in jupyter_server's words."""
    kernel_id = call.path["kernel_id"]
    try:
        return call.gateway.kernel_sandbox(kernel_id)
    except UnknownSandboxError as error:
        raise ApiError(404, "kernel_not_found", f"Kernel does not exist: {kernel_id}") from error


@routes("GET /api/kernels")
async def list_kernels(call: Call) -> list[KernelAnswer]:
    """All kernels."""
    return [call.gateway.kernel(sandbox) for sandbox in call.gateway.kernels()]


@routes(
    "POST /api/kernels",
    status=201,
    errors=CREATE_ERRORS,
    headers={"Location": "The kernel's path."},
    ends_with_client=True,
)
async def create_kernel(call: Call, body: CreateKernel) -> KernelAnswer:
    """A new kernel in a sandbox of its own, or the one that was left behind with this notebook."""
    request = create_request(body, call.gateway.default_template())
    sandbox = await call.gateway.create(request)
    call.headers["Location"] = f"/api/kernels/{sandbox.id}"
    return call.gateway.kernel(sandbox)


@routes("GET /api/kernels/{kernel_id}", errors=(404,))
async def get_kernel(call: Call) -> KernelAnswer:
    """One kernel."""
    return call.gateway.kernel(find(call))


@routes("DELETE /api/kernels/{kernel_id}", errors=(404,))
async def delete_kernel(call: Call) -> None:
    """Ends a kernel. That of a notebook is kept asleep for the next who opens it (delete_means_sleep); DELETE
    /api/sandboxes/{id} ends it for good."""
    await call.gateway.release(find(call).id)


@routes("POST /api/kernels/{kernel_id}/interrupt", errors=(404, 409, 413, 502, 504))
async def interrupt_kernel(call: Call) -> None:
    """Interrupts the cell that runs."""
    await call.gateway.service.interrupt(find(call).id)


@routes("POST /api/kernels/{kernel_id}/restart", errors=(404, 409, 413, 502, 504))
async def restart_kernel(call: Call) -> KernelAnswer:
    """A new kernel in the same sandbox: files stay, variables go."""
    kernel_id = find(call).id
    await call.gateway.service.restart(kernel_id)
    return call.gateway.kernel(call.gateway.service.registry.get(kernel_id))
