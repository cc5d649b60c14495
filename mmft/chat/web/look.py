"""How the page looks, and the little it does in the browser itself."""

# The chat areas take what the window leaves and scroll inside, so that the box is always in sight. Text is shown as it
# is, so its line breaks and spaces are kept. Hidden: gradio's own "Clear", which empties the screen and not the
# conversation, "Share", which would upload a picture, the sidebar's arrow, which "Settings" presses, and the word
# "Error" across the chat, where the conversation says what was wrong.
CSS = """
gradio-app, .gradio-container { height: 100dvh; min-height: 0 !important; }
.gradio-container { width: 100%; max-width: 900px !important; margin: 0 auto !important; overflow-y: auto !important; }
.gradio-container:has(#chat-1) { max-width: 1400px !important; }
.gradio-container > .main { min-height: 0 !important; padding: 12px clamp(8px, 2.5vw, 32px) !important; }
#top { align-items: center; flex-wrap: nowrap; gap: 8px; }
#title { overflow: hidden; padding: 0; min-width: 0; }
#title h1 { font-size: 1.15rem; margin: 0; white-space: nowrap; }
#title p { color: var(--body-text-color-subdued); margin: 0; white-space: nowrap; overflow: hidden;
  text-overflow: ellipsis; }
#top button { flex: 0 0 auto; white-space: nowrap; }
#chats { flex: 1 1 0; flex-wrap: nowrap; min-height: 200px; }
#chats > .column { min-width: 0 !important; height: 100%; gap: 4px; flex-wrap: nowrap; }
#chats > .column > :not(.chat) { flex: 0 0 auto; }
#chats .chat { flex: 1 1 0; min-height: 0; height: auto !important; }
#chats h2 { font-size: 0.95rem; margin: 0; overflow-wrap: anywhere; }
.chat .message, .chat .message-markdown-disabled { white-space: normal; }
.chat .message-content .md { white-space: pre-wrap; overflow-wrap: anywhere; }
.chat .thought-group { border: none; background: none; padding: 0; margin: 0; }
.chat .image-frame img { max-height: 220px; width: auto; }
.chat .edit-textarea { width: min(32rem, 60vw) !important; min-height: 5.5rem; }
.chat > .wrap:has(.error), #entry > .wrap:has(.error), .chat > .wrapper > .top-panel,
.chat .message-row:has(.image-container) + .message-buttons { display: none; }
#examples { gap: 8px; align-items: center; }
#examples button { flex: 0 1 auto; min-width: 0; font-weight: normal; white-space: normal; }
#examples .picture { padding: 4px; }
#examples .picture img { height: 56px; width: auto; border-radius: 4px; margin: 0; }
#settings:not(.open) .toggle-button { visibility: hidden; }
#file, #leave { display: none !important; }
@media (max-width: 640px) {
  #title { display: none; }
  #top { justify-content: flex-end; }
  #top button { padding: 4px 8px; }
  .chat .bubble { margin-left: 6px !important; margin-right: 6px !important; max-width: 100% !important; }
  #chats:has(#chat-1) { flex-direction: column; }
}
"""
# The box is closed while an answer is written; then the cursor goes back, except where that opens a phone's keyboard.
FOCUS = "() => matchMedia('(hover: hover)').matches && document.querySelector('#entry textarea').focus()"
# A file that Python has written, by its address on the server.
FETCH = """(file) => {
  if (!file) return;
  const link = Object.assign(document.createElement('a'), { href: file.url, download: file.orig_name });
  link.click();
}"""
UNFOLD = "() => document.querySelector('#settings .toggle-button').click()"
# A press of the hidden button whose event cancels what waits in the queue: gradio binds that to no other event's end.
LEAVE = "() => document.querySelector('#leave').click()"
