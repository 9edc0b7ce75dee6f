export const actions = {
  default: async ({ request }) => ({ word: (await request.formData()).get('word') }),
};
