def test_x():
    import pipecat.services.tts_service, pipecat.tests.utils, pipecat.evals.tts
    from pipecat.processors.aggregators.llm_response_universal import LLMContextAggregatorPair
    from pipecat.transports.base_output import BaseOutputTransport
    from pipecat.pipeline.worker import PipelineWorker
    from pipecat.pipeline.service_switcher import ServiceSwitcher
