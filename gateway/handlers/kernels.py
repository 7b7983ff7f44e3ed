"""Jupyter's kernels: a kernel is a sandbox, its id the sandbox's."""

from __future__ import annotations

from gateway.endpoint import Call, Endpoint, Operation, Reply
from gateway.errors import ApiError
from gateway.models import CreateKernel, KernelAnswer
from kernels.errors import UnknownSandboxError
from kernels.models import CreateSandbox, Sandbox

KERNEL_ID = {"kernel_id": "The kernel's id."}
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


async def list_kernels(call: Call) -> Reply:
    return Reply(body=[call.gateway.kernel(sandbox) for sandbox in call.gateway.kernels()])


async def create_kernel(call: Call) -> Reply:
    request = create_request(call.body, call.gateway.default_template())
    sandbox = await call.gateway.create(request)
    call.gateway.hub.prepare(sandbox.id)
    return Reply(status=201, body=call.gateway.kernel(sandbox), headers={"Location": f"/api/kernels/{sandbox.id}"})


async def get_kernel(call: Call) -> Reply:
    return Reply(body=call.gateway.kernel(find(call)))


async def delete_kernel(call: Call) -> Reply:
    await call.gateway.release(find(call).id)
    return Reply(status=204)


async def interrupt_kernel(call: Call) -> Reply:
    await call.gateway.service.interrupt(find(call).id)
    return Reply(status=204)


async def restart_kernel(call: Call) -> Reply:
    kernel_id = find(call).id
    await call.gateway.service.restart(kernel_id)
    return Reply(body=call.gateway.kernel(call.gateway.service.get(kernel_id)))


ENDPOINTS = (
    Endpoint(
        path="/api/kernels",
        operations={
            "GET": Operation(name="listKernels", summary="All kernels.", run=list_kernels, reply=list[KernelAnswer]),
            "POST": Operation(
                name="createKernel",
                summary="A new kernel in a sandbox of its own, or the one that was left behind with this notebook.",
                run=create_kernel,
                ends_with_client=True,
                body=CreateKernel,
                reply=KernelAnswer,
                status=201,
                errors=CREATE_ERRORS,
                headers={"Location": "The kernel's path."},
            ),
        },
    ),
    Endpoint(
        path="/api/kernels/{kernel_id}",
        parameters=KERNEL_ID,
        operations={
            "GET": Operation(
                name="getKernel", summary="One kernel.", run=get_kernel, reply=KernelAnswer, errors=(404,)
            ),
            "DELETE": Operation(
                name="deleteKernel",
                summary="Ends a kernel. That of a notebook is kept asleep for the next who opens it "
                "(delete_means_sleep); DELETE /api/sandboxes/{id} ends it for good.",
                run=delete_kernel,
                status=204,
                errors=(404,),
            ),
        },
    ),
    Endpoint(
        path="/api/kernels/{kernel_id}/interrupt",
        parameters=KERNEL_ID,
        operations={
            "POST": Operation(
                name="interruptKernel",
                summary="Interrupts the cell that runs.",
                run=interrupt_kernel,
                status=204,
                errors=(404, 409, 413, 502, 504),
            )
        },
    ),
    Endpoint(
        path="/api/kernels/{kernel_id}/restart",
        parameters=KERNEL_ID,
        operations={
            "POST": Operation(
                name="restartKernel",
                summary="A new kernel in the same sandbox: files stay, variables go.",
                run=restart_kernel,
                reply=KernelAnswer,
                errors=(404, 409, 413, 502, 504),
            )
        },
    ),
)
