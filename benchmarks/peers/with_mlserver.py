"""MLServer: a custom runtime with adaptive batching, asked over the Open Inference Protocol.

    python benchmarks/peers/with_mlserver.py --artifact DIR --port N --batch 32 --window-ms 2 --workers 0 --threads 1

`workers` is `parallel_workers`: 0 computes in the server's own process.
"""

from __future__ import annotations

import asyncio

import numpy as np
from _options import Options, read_options
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec
from mlserver.settings import ModelParameters
from mlserver.types import InferenceRequest, InferenceResponse
from programs import Programs


class Encoder(MLModel):
    async def load(self) -> bool:
        parameters = self.settings.parameters
        self._programs = Programs(parameters.uri, parameters.extra["threads"])
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        x, steps = (NumpyCodec.decode_input(tensor) for tensor in payload.inputs)
        mu, log_sigma, elbo = await asyncio.to_thread(self._programs.encode, x.astype(np.float32, copy=False), steps[:, 0])
        outputs = {"mu": mu, "log_sigma": log_sigma, "elbo": elbo[:, None]}
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output(*output) for output in outputs.items()])


async def serve(options: Options) -> None:
    from with_mlserver import Encoder as Importable  # by a name that worker processes find too

    model = ModelSettings(
        name="encode",
        implementation=Importable,
        max_batch_size=options.batch,
        max_batch_time=options.window_ms / 1e3,
        parameters=ModelParameters(uri=str(options.artifact), extra={"threads": options.threads}),
    )
    ports = {"http_port": options.port, "grpc_port": options.port + 1, "metrics_port": options.port + 2}
    settings = Settings(host="127.0.0.1", parallel_workers=options.workers, debug=False, metrics_endpoint=None, **ports)
    await MLServer(settings).start([model])


if __name__ == "__main__":
    asyncio.run(serve(read_options()))
