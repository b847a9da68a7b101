// What a person does to a page that react-test-renderer shows: reads, types, clicks. Takes react's own functions,
// because every generation has its own copy.
import { until } from './until.mjs';

export function pageOf({ createElement, act }, { create }, component) {
  let renderer;
  const find = (type) => renderer.root.findAllByType(type);
  // React flushes what an action changes at once, and whatever comes later by itself, as in a browser.
  const acting = async (action) => {
    globalThis.IS_REACT_ACT_ENVIRONMENT = true;
    await act(async () => void action());
    globalThis.IS_REACT_ACT_ENVIRONMENT = false;
  };
  const page = {
    open: () => acting(() => (renderer = create(createElement(component)))),
    close: () => acting(() => renderer.unmount()),
    // The text of every element of a type.
    texts: (type) => find(type).map(textOf),
    isDisabled: (type) => find(type)[0].props.disabled,
    type: (type, value) => acting(() => find(type)[0].props.onChange({ target: { value } })),
    submit: () => acting(() => find('form')[0].props.onSubmit({ preventDefault() {} })),
    click: (label) =>
      acting(() =>
        find('button')
          .find((element) => textOf(element) === label)
          .props.onClick()
      ),
    sees: (condition, what) => until(() => condition(page), what),
  };
  return page;
}

const textOf = (element) =>
  element.children.map((child) => (typeof child === 'string' ? child : textOf(child))).join('');
