"""Recorded conversations: files -> messages -> turns of a chat template -> rollouts."""

from flexpg.conversations.messages import template_messages, template_tools
from flexpg.conversations.rollouts import Conversation, conversation_rollouts
from flexpg.conversations.transcripts import read_conversations

__all__ = ["Conversation", "conversation_rollouts", "read_conversations", "template_messages", "template_tools"]
